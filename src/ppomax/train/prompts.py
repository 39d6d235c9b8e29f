"""Prompts and plain text as endless streams, where the seed alone decides what comes at a place."""

from dataclasses import dataclass

from ppomax.data.batching import derived_seed, permutation
from ppomax.data.fitting import Limit, check_fitting, fit_row
from ppomax.data.formats import BadRow
from ppomax.data.sources import Loaded, load_prompts, load_text, split_by_prompt
from ppomax.data.template import ChatTemplate
from ppomax.errors import DataError
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_settings import PtxSettings
from ppomax.types import PromptRow


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready to be answered."""

    index: int
    """Its place in the data; part of its replies' seeds."""
    row: PromptRow
    ids: list[int]


class PromptStream:
    """Batches of prompts, epoch after epoch, each a new permutation."""

    def __init__(
        self, prompts: list[Prompt], loaded: Loaded[PromptRow], bad: list[BadRow], seed: int
    ) -> None:
        self.prompts, self.loaded, self.seed = prompts, loaded, seed
        self.bad = bad
        """Rows set aside."""
        self._orders: dict[int, list[int]] = {}

    def batch(self, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start` of the endless stream."""
        return [self._at(place) for place in range(start, start + count)]

    def _at(self, place: int) -> Prompt:
        epoch, position = divmod(place, len(self.prompts))
        if epoch not in self._orders:
            rows = [prompt.row for prompt in self.prompts]
            self._orders = {epoch: self.loaded.order_of(rows, self.seed, epoch)}
        return self.prompts[self._orders[epoch][position]]


def load_stream(config: PPOConfig, template: ChatTemplate) -> PromptStream:
    """Read, encode, cut the oldest turns.

    Raises:
        DataError: no prompt fits `max_prompt`, or more than `max_bad_rows` cannot be used.
    """
    loaded = load_prompts(config.data, max_bad_rows=config.max_bad_rows)
    prompts, bad = [], list(loaded.bad)
    limit = Limit("ppo.max_prompt", config.max_prompt, "prompt")
    seen: set[tuple[int, ...]] = set()
    for index, row in enumerate(split_by_prompt(loaded.rows, config.heldout).train):
        fitted = fit_row(row, lambda row: template.fit(row.messages, limit.tokens), limit, bad)
        if fitted is not None and tuple(fitted[1]) not in seen:
            seen.add(tuple(fitted[1]))
            prompts.append(Prompt(index, row, fitted[1]))
    check_fitting(loaded, bad, config.max_bad_rows, limit, some=bool(prompts))
    return PromptStream(prompts, loaded, bad, config.seed)


def reply_seeds(
    prompts: list[Prompt], *, seed: int, stage: str, attempt: int, iteration: int
) -> list[int]:
    """One seed per reply, never a function of rank or slot; repeated prompts are numbered."""
    seen: dict[int, int] = {}
    seeds = []
    for prompt in prompts:
        sample = seen.get(prompt.index, 0)
        seen[prompt.index] = sample + 1
        seeds.append(derived_seed(seed, stage, attempt, iteration, prompt.index, sample))
    return seeds


class TextStream:
    """Pieces of plain text for the language-modelling term."""

    def __init__(
        self, settings: PtxSettings, template: ChatTemplate, seed: int, max_bad_rows: float
    ) -> None:
        rows = load_text(settings.data, max_bad_rows=max_bad_rows).rows
        self.seed = seed
        self.pieces: list[list[int]] = []
        for row in rows:
            ids = template.tokenizer(row.text, add_special_tokens=False)["input_ids"]
            cuts = [ids[at : at + settings.length] for at in range(0, len(ids), settings.length)]
            self.pieces += [piece for piece in cuts if len(piece) >= 8]
        if not self.pieces:
            raise DataError("setting ppo.ptx.data: no text of at least 8 tokens; give more")

    def take(self, tokens: int, *parts: int | str) -> list[list[int]]:
        """Pieces of about `tokens` predicted tokens in all, chosen by the seed and `parts`."""
        taken: list[list[int]] = []
        count = 0
        for index in permutation(len(self.pieces), self.seed, "ptx", *parts):
            piece = self.pieces[index][: tokens - count + 1]
            if len(piece) < 2:
                break
            taken.append(piece)
            count += len(piece) - 1
        return taken
