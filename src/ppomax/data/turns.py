"""Dialogues out of the many ways people write them. Files and columns are not known here."""

import re

from ppomax.types import Message, Messages

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class Defect(Exception):
    """Why a row cannot be used; becomes a `BadRow`, never reaches a user."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def text_of(value: object, name: str) -> str:
    """The value itself, which must be a string."""
    if not isinstance(value, str):
        raise Defect("wrong-type", f"{name} is {_type(value)}, wanted a string")
    return value


def user(content: str) -> Message:
    """A turn of the user's."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A turn of the assistant's."""
    return {"role": "assistant", "content": content}


def read_messages(value: object, name: str) -> Messages:
    """Message objects, `{role, content}` or ShareGPT's `{from, value}`; one alone may be bare."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Defect("wrong-type", f"{name} is {_type(value)}, wanted a list of messages")
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(item: object, name: str) -> Message:
    if not isinstance(item, dict):
        raise Defect("wrong-type", f"{name} is {_type(item)}, wanted a message object")
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in item:
            written = text_of(item[role_key], f"{name}.{role_key}")
            role = _ROLES.get(written.strip().lower())
            if role is None:
                raise Defect(
                    "unknown-role",
                    f"{name} has the role {written[:40]!r}; known are "
                    "system, user (human), assistant (gpt, bot)",
                )
            if item.get(content_key) is None:
                raise Defect("missing-field", f"{name} has no {content_key}")
            return {"role": role, "content": text_of(item[content_key], f"{name}.{content_key}")}
    raise Defect("missing-field", f"{name} has neither role nor from")


def read_turns(value: object, name: str) -> Messages:
    """A list of strings, the user's first (MOSS-RLHF)."""
    if not isinstance(value, list):
        raise Defect("wrong-type", f"{name} is {_type(value)}, wanted a list of turns")
    texts = [text_of(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return tuple(assistant(text) if index % 2 else user(text) for index, text in enumerate(texts))


def is_hh(text: str) -> bool:
    """Whether a string is a dialogue as Anthropic's HH-RLHF writes it."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text.replace("\r\n", "\n")


def read_hh(text: str) -> Messages:
    r"""A dialogue of HH-RLHF, `\n\nHuman: ...\n\nAssistant: ...`, outer whitespace taken off."""
    _, *parts = _HH_TURN.split(text.replace("\r\n", "\n"))
    roles, contents = parts[::2], parts[1::2]
    return tuple(
        user(content.strip()) if role == "Human" else assistant(content.strip())
        for role, content in zip(roles, contents, strict=True)
    )


def read_prompt(value: object, name: str) -> Messages:
    """What stands before an answer: messages, turns, HH text, or one string of the user's."""
    if isinstance(value, str):
        if not is_hh(value):
            return (user(value),)
        messages = read_hh(value)
        return messages[:-1] if messages[-1] == assistant("") else messages
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return read_turns(value, name)
    if isinstance(value, list | dict):
        return read_messages(value, name)
    raise Defect("wrong-type", f"{name} is {_type(value)}, wanted a string or a list of messages")


def check_turns(messages: Messages, last: str) -> None:
    """Hold a dialogue to [system] user (assistant user)*, with nothing empty and the right end.

    Raises:
        Defect: of the kind empty-prompt, empty-answer, not-alternating or last-turn.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise Defect("empty-prompt", "the dialogue has no turns")
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn["role"] != expected:
            found = (
                "a system turn, which may stand first only"
                if turn["role"] == "system"
                else (f"the {turn['role']}'s, expected the {expected}'s")
            )
            raise Defect("not-alternating", f"turn {index + 1} is {found}")
    for index, turn in enumerate(turns):
        if not turn["content"].strip():
            kind = "empty-prompt" if turn["role"] == "user" else "empty-answer"
            raise Defect(kind, f"turn {index + 1}, the {turn['role']}'s, is empty")
    if turns[-1]["role"] != last:
        raise Defect(
            "last-turn", f"the last turn is the {turns[-1]['role']}'s, wanted the {last}'s"
        )


def _type(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")
