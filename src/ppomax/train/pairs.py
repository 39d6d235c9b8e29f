"""Preference pairs as token ids, and what a user should know of them before training."""

from collections.abc import Sequence
from dataclasses import dataclass

from ppomax.data.batching import TokenBatch, collate
from ppomax.data.check import ONE_SIDED
from ppomax.data.template import ChatTemplate, Encoded
from ppomax.distributed import World
from ppomax.types import PreferenceRow


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference, encoded."""

    row: PreferenceRow
    chosen: Encoded
    rejected: Encoded

    @property
    def tokens(self) -> int:
        """Tokens of both dialogues."""
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, the same in both."""
        return len(self.chosen.ids) - self.chosen.num_targets


def encode_pair(row: PreferenceRow, template: ChatTemplate, max_length: int) -> Pair | None:
    """Both dialogues with the same prompt, older turns dropped until the longer one fits.

    Only the last answer is a target: earlier assistant turns are part of the prompt.
    """
    answers = [template.answer(text) for text in (row.chosen, row.rejected)]
    fitted = template.fit(row.prompt, max_length - max(map(len, answers)))
    if fitted is None:
        return None
    prompt = fitted[1]
    sides = [
        Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers
    ]
    return Pair(row, *sides)


def stack(pairs: Sequence[Pair], pad: int, here: World, *, imitate: bool) -> TokenBatch:
    """Preferred dialogues first, then the others in the same order; targets on the preferred."""
    rows = [(pair.chosen.ids, pair.chosen.mask if imitate else []) for pair in pairs]
    rows += [(pair.rejected.ids, []) for pair in pairs]
    return collate([(ids, mask or [False] * len(ids)) for ids, mask in rows], pad, here.device)


def length_note(pairs: Sequence[Pair]) -> str | None:
    """A warning where which answer is longer already tells which is preferred."""
    gaps = [pair.chosen.num_targets - pair.rejected.num_targets for pair in pairs]
    unequal = [gap for gap in gaps if gap]
    if not unequal:
        return None
    share = sum(gap > 0 for gap in unequal) / len(unequal)
    if max(share, 1 - share) < ONE_SIDED:
        return None
    which = "longer" if share > 0.5 else "shorter"
    return (
        f"in {max(share, 1 - share):.1%} of {len(unequal)} pairs of unequal length the preferred "
        f"answer is the {which} one: a reward model can learn length and nothing else from them"
    )
