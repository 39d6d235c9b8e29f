"""Which row comes when and on which side: mixtures, held-out prompts, overlap. No files here.

Everything is a pure function of its arguments; no random state is kept.
"""

import hashlib
import random
import unicodedata
from collections.abc import Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from ppomax.errors import ConfigError
from ppomax.types import Messages, PreferenceRow, PromptRow, SFTRow


def mixture_order(
    lengths: Sequence[int], weights: Sequence[float | None], *, seed: int, epoch: int
) -> list[tuple[int, int]]:
    """(source, row) for every place of an epoch, which is as long as all sources together.

    Without weights a permutation of all rows. With weights each source gets its share of places,
    spread evenly, and goes on in the next epoch where it stopped: its rows are a stream of
    permutations, so a small source repeats only once it has been through.

    Raises:
        ConfigError: some sources have a weight and some have none.
    """
    total, given = sum(lengths), check_weights(weights)
    if not given:
        every = [(source, row) for source, length in enumerate(lengths) for row in range(length)]
        _random(seed, "all", epoch).shuffle(every)
        return every
    counts = _shares(total, [w if n else 0.0 for w, n in zip(given, lengths, strict=True)])
    placed: list[tuple[float, int, int]] = []
    for source, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        offset = _random(seed, "offset", epoch, source).random()
        stream = _stream(seed, source, length, first=epoch * count, count=count)
        placed += [((k + offset) / count, source, row) for k, row in enumerate(stream)]
    return [(source, row) for _, source, row in sorted(placed)]


def check_weights(weights: Sequence[float | None]) -> list[float]:
    """The weights of the sources, or nothing where none has one.

    Raises:
        ConfigError: some sources have a weight and some have none.
    """
    given = [weight for weight in weights if weight is not None]
    if given and len(given) != len(weights):
        raise ConfigError("weight: give every source of a list a weight, or none of them")
    return given


def prompt_of(row: PreferenceRow | SFTRow | PromptRow) -> Messages:
    """The dialogue before the answer."""
    if isinstance(row, PreferenceRow):
        return row.prompt
    return row.messages[:-1] if isinstance(row, SFTRow) else row.messages


Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """So many of them, at equal distances; all where `count` is None or more than there are."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


Dialogue = TypeVar("Dialogue", PreferenceRow, SFTRow, PromptRow)


class Split(NamedTuple, Generic[Dialogue]):
    """Rows to learn from and rows to measure on."""

    train: list[Dialogue]
    heldout: list[Dialogue]


def split_by_prompt(rows: Sequence[Dialogue], share: float, salt: str = "") -> Split[Dialogue]:
    """Hold out about `share` of the prompts, by a hash of each prompt's normalised text.

    Rows of one prompt stay together, so no held-out prompt is ever trained on, and a row's side
    does not change when others are added. With 0 < share and two prompts or more, neither side
    is empty.
    """
    places = {key: _place(salt, key) for key in dict.fromkeys(map(_normalised, rows))}
    out = {key for key, at in places.items() if at < share}
    if share > 0 and len(places) > 1:
        if not out:
            out = {min(places, key=places.__getitem__)}
        elif len(out) == len(places):
            out.discard(max(places, key=places.__getitem__))
    train: list[Dialogue] = []
    heldout: list[Dialogue] = []
    for row in rows:
        (heldout if _normalised(row) in out else train).append(row)
    return Split(train, heldout)


class Overlap(NamedTuple):
    """A held-out row whose prompt was trained on."""

    train: str
    """`file:line` of the first such training row."""
    heldout: str
    how: Literal["exact", "normalised"]
    """Whether the texts are equal, or equal but for case, spaces and character width."""


def overlap(
    train: Sequence[PreferenceRow | SFTRow | PromptRow],
    heldout: Sequence[PreferenceRow | SFTRow | PromptRow],
) -> list[Overlap]:
    """Every held-out row whose prompt stands among the training rows too."""
    return _shared(
        [Text(_text(prompt_of(row)), _normalised(row), row.where) for row in train],
        [Text(_text(prompt_of(row)), _normalised(row), row.where) for row in heldout],
    )


def exchange_overlap(
    train: Sequence[PreferenceRow | SFTRow], heldout: Sequence[PreferenceRow | SFTRow]
) -> list[Overlap]:
    """Every held-out row whose last question and answers stand in a training row too.

    A split by prompt cannot see these: the dialogues part in an earlier turn. The answers of a pair
    count in either order.
    """
    return _shared([_exchange(row) for row in train], [_exchange(row) for row in heldout])


class Text(NamedTuple):
    """What a row is compared by."""

    exact: str
    normalised: str
    where: str


def _shared(train: list[Text], heldout: list[Text]) -> list[Overlap]:
    """Held-out texts that are training texts, as they are or evened out."""
    exact: dict[str, str] = {}
    near: dict[str, str] = {}
    for text in train:
        exact.setdefault(text.exact, text.where)
        near.setdefault(text.normalised, text.where)
    found = []
    for text in heldout:
        if text.exact in exact:
            found.append(Overlap(exact[text.exact], text.where, "exact"))
        elif text.normalised in near:
            found.append(Overlap(near[text.normalised], text.where, "normalised"))
    return found


def _exchange(row: PreferenceRow | SFTRow) -> Text:
    """The last question and what answers it."""
    if isinstance(row, PreferenceRow):
        answers = [row.chosen, row.rejected]
    else:
        answers = [row.messages[-1]["content"]]
    question = prompt_of(row)[-1]["content"]
    exact = "\x1e".join([question, *sorted(answers)])
    return Text(exact, "\x1e".join([_flat(question), *sorted(map(_flat, answers))]), row.where)


def _stream(seed: int, source: int, length: int, *, first: int, count: int) -> list[int]:
    """Places `first` to `first + count` of one permutation of the rows after another."""
    rows: list[int] = []
    turn, skip = divmod(first, length) if count else (0, 0)
    while len(rows) < skip + count:
        order = list(range(length))
        _random(seed, "pass", turn, source).shuffle(order)
        rows += order
        turn += 1
    return rows[skip : skip + count]


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` places divided in proportion to the weights, by largest remainder."""
    whole = sum(weights)
    exact = [total * weight / whole if whole else 0.0 for weight in weights]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _random(*parts: int | str) -> random.Random:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def _text(messages: Messages) -> str:
    return "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in messages)


def _normalised(row: PreferenceRow | SFTRow | PromptRow) -> str:
    """The prompt with case, white space and character width (NFKC) evened out."""
    turns = (f"{message['role']} {message['content']}" for message in prompt_of(row))
    return "\n".join(map(_flat, turns))


def _flat(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _place(salt: str, key: str) -> float:
    """A number in [0, 1) that only the text decides."""
    digest = hashlib.sha256(f"{salt}\x1f{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
