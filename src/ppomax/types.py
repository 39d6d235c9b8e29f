"""Records that pass between layers: dialogues and the rows made of them. No logic."""

from dataclasses import dataclass, field
from typing import Any, TypedDict


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A dialogue that waits for the assistant: the last message is the user's."""

    id: str
    messages: Messages
    meta: dict[str, Any] = field(default_factory=dict)
    """Every other scalar column of the row: `lang`, `kind`, `source`, ..."""
    where: str = ""
    """`file:line` it was read from."""


@dataclass(frozen=True, slots=True)
class SFTRow:
    """A dialogue to imitate: the last message is the assistant's."""

    id: str
    messages: Messages
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one dialogue, the first preferred."""

    id: str
    prompt: Messages
    chosen: str
    rejected: str
    weight: float = 1.0
    """Share of the pair in the loss; the pairs of one ranked list sum to 1."""
    strength: float | None = None
    """How much better the chosen answer is, where the data says (a margin in the loss)."""
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text for the language-modelling mix (PPO-ptx)."""

    id: str
    text: str
    where: str = ""
