"""Dialogues to token ids: one function for every stage, so that the same text has the same ids.

A dialogue is cut at its assistant turns and each piece is tokenised alone, just as a rollout sees
it: prompt ids first, then the answer's own ids. An answer is its content and the end-of-turn token
and nothing after it; what the template writes behind that token belongs to the next prompt piece.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ppomax.errors import ModelError
from ppomax.types import Message, Messages

FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant: ' }}{% endif %}"
)
"""For tokenizers that ship no chat template: the dialogue form of Anthropic's HH data."""


_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The date that Llama 3's own template falls back to."""


def settle_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a chat template whose ids are the same every day.

    Without one it gets the fallback, beginning as the tokenizer begins a text. Where one prints
    today's date, a fixed date takes its place. Exports carry the settled template.
    """
    template = tokenizer.chat_template
    if not template:
        tokenizer.chat_template = _own_start(tokenizer) + FALLBACK_TEMPLATE
    elif isinstance(template, str):
        tokenizer.chat_template = _CLOCK.sub(
            lambda found: repr(_DATE.strftime(found.group(2))), template
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a dialogue and which of them the assistant wrote."""

    ids: list[int]
    mask: list[bool]
    """True on assistant tokens, the end-of-turn token included."""

    @property
    def num_targets(self) -> int:
        """Assistant tokens."""
        return sum(self.mask)


class ChatTemplate:
    """A tokenizer's chat template with the assistant's spans known exactly.

    Raises:
        ModelError: the template is not prefix-preserving (adding a turn changes earlier text), or
            refuses a dialogue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        settle_template(tokenizer)
        self.end_id, self.writes_end = self._find_end()
        self.end_ids = frozenset({self.end_id, *_ids(tokenizer.eos_token_id)})
        """Every id that ends a reply: the template's end-of-turn token and the tokenizer's eos."""
        self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_id))

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A dialogue up to its last assistant turn; its last id is the end-of-turn token."""
        messages = self._with_system(messages)
        ids: list[int] = []
        mask: list[bool] = []
        before = said = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text = self._render(messages[:place], generation=True)
            prompt = self._tokenize(text[self._answer_end(text, before, said) if ids else 0 :])
            before, said = text, message["content"]
            answer = self.answer(said)
            ids += prompt + answer
            mask += [False] * len(prompt) + [True] * len(answer)
        return Encoded(ids, mask)

    def whole(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a dialogue as the template writes it to its end, for models trained elsewhere."""
        return self._tokenize(self._render(self._with_system(messages), generation=False))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to the point where the assistant is to write."""
        return self.encode([*messages, Message(role="assistant", content="")]).ids[:-1]

    def answer(self, text: str) -> list[int]:
        """Ids of an answer: its content and the end-of-turn token."""
        return [*self._tokenize(text), self.end_id]

    def fit(self, messages: Messages, max_tokens: int) -> tuple[Messages, list[int]] | None:
        """The prompt with its oldest turns dropped until it fits.

        None if the last turn alone is too long.
        """
        system = tuple(m for m in messages[:1] if m["role"] == "system")
        turns = messages[len(system) :]
        while turns:
            kept = system + turns
            ids = self.prompt(kept)
            if len(ids) <= max_tokens:
                return kept, ids
            turns = turns[1:]
            while turns and turns[0]["role"] != "user":
                turns = turns[1:]
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, the end-of-turn token left out."""
        ids = list(ids)
        if ids and ids[-1] in self.end_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text if isinstance(text, str) else "".join(text)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            return [Message(role="system", content=self.system), *messages]
        return list(messages)

    def _answer_end(self, text: str, before: str, answer: str) -> int:
        """Where in `text` an answer to the prompt `before` ends, white space around it aside."""
        bare = answer.strip()
        trailing = answer[len(answer.rstrip()) :]
        end = rf"\s*{re.escape(self.end_text)}" if self.writes_end else f"(?:{trailing})?"
        found = re.compile(rf"\s*{re.escape(bare)}{end}").match(text, len(before))
        if not text.startswith(before) or found is None:
            raise ModelError(
                "the chat template is not prefix-preserving: adding a turn changes the text before "
                "it, so the assistant's tokens cannot be told apart; change chat_template in the "
                "model's folder"
            )
        return found.end()

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (TemplateError, OverflowError, TypeError, ValueError) as error:  # the sandbox's too
            raise ModelError(
                f"the chat template refuses a dialogue ({error}); leave such dialogues out, or "
                "change chat_template in the model's folder"
            ) from None
        return str(rendered)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_end(self) -> tuple[int, bool]:
        """The special token that the template writes after an answer, else the tokenizer's eos.

        And whether the template writes one.
        """
        marker = "ppomax-answer"
        messages = [Message(role="user", content="a"), Message(role="assistant", content=marker)]
        tail = self._render(messages, generation=False).rpartition(marker)[2]
        added = self.tokenizer.added_tokens_decoder
        special = {token for token in added if added[token].special}
        special |= set(self.tokenizer.all_special_ids)
        for token in self._tokenize(tail):
            if token in special:
                return int(token), True
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token and its template writes none")
        return int(self.tokenizer.eos_token_id), False


def _own_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts before plain text, for a template that knows nothing of it."""
    starts = list(tokenizer("a")["input_ids"])[:1] == _ids(tokenizer.bos_token_id)
    return "{{ bos_token }}" if starts and tokenizer.bos_token_id is not None else ""


def _ids(found: int | None) -> list[int]:
    return [] if found is None else [int(found)]
