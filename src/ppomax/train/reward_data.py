"""What the reward model learns from: its settings, pairs encoded, batches planned."""

from typing import Literal

from pydantic import Field

from ppomax.data.sources import load_preferences
from ppomax.data.splits import spread
from ppomax.data.template import ChatTemplate
from ppomax.data.turns import Defect
from ppomax.errors import DataError
from ppomax.train.optim import OptimSettings
from ppomax.train.pairs import Pair, encode_pair, length_note
from ppomax.train.supervised import StageData, SupervisedSettings, build_data
from ppomax.types import PreferenceRow

RewardData = StageData[PreferenceRow, Pair]


class RewardConfig(SupervisedSettings):
    """Learn a score from preferences."""

    lm_coef: float = Field(1.0, ge=0)
    """β_rm of eq. 2: weight of the imitation loss (paper: 1; its released scripts: 0)."""
    ranking_coef: float = Field(1.0, gt=0)
    """λ of eq. 2 (paper: 1)."""
    margin: float = Field(0.0, ge=0)
    """Score difference asked for (Touvron et al. 2023, 2307.09288, eq. 2)."""
    strength: Literal["margin", "weight"] = "margin"
    """What a pair's own strength does where the data has one: multiply `margin`, or be the pair's
    weight in the ranking loss. Ours."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels."""
    centre_coef: float | None = Field(None, gt=0)
    """Weight of a term that pulls the mean of a pair's scores to 0 (Eisenstein et al. 2023,
    2312.09244); PPO's normalisation makes up for a shifted score, so null. Others take 0.01."""
    min_pairs: int = Field(4, ge=1)
    """Fewest pairs in a step (paper: 4)."""
    max_pairs: int = Field(128, ge=1)
    """Most pairs in a step (paper: 128)."""
    eval_pairs: int | None = Field(500, ge=1)
    """Held-out pairs in each evaluation and in the card, spread evenly over all of them, so that
    every source has its share; null takes all."""
    ensemble: int | None = Field(None, ge=2)
    """Train so many models that differ by their seed, and export them together; null trains one.
    Ours, after Coste et al. 2023 (2310.02743)."""
    share_prompts: bool | None = None
    """Compute a pair's prompt once, behind it both answers and a mask: no result changes beyond
    rounding. Null does so on a processor where it saves a fifth of the padded tokens
    (`benchmarks/shared_prompts.py`; not measured on GPUs), the model takes the mask, and does not
    compute what several texts begin with once by itself, as Llama's kind does."""
    optim: OptimSettings = OptimSettings(lr=5e-6, schedule="inverse_sqrt", warmup=0.1)
    """The paper's 5e-6 is for 7B; small models need more."""


def load_data(config: RewardConfig, template: ChatTemplate) -> RewardData:
    """Read, split and encode; plan every step.

    Raises:
        DataError: no pair fits `max_length`, or no pair has the strength that is to weigh it.
    """
    loaded = load_preferences(config.data, max_bad_rows=config.max_bad_rows)
    data = build_data(
        config,
        loaded,
        lambda row: _encode(row, template, config.max_length),
        lambda pair: pair.tokens,
        "pair",
        least=config.min_pairs,
        most=config.max_pairs,
    )
    if config.strength == "weight" and not any(pair.row.strength for pair in data.train):
        raise DataError(
            "setting reward.strength: no pair has a strength above 0; name its column in "
            "data.strength, or set reward.strength to margin"
        )
    data.notes.extend(filter(None, [length_note(data.train)]))
    data.heldout[:] = spread(data.heldout, config.eval_pairs)
    return data


def _encode(row: PreferenceRow, template: ChatTemplate, max_length: int) -> Pair | None:
    """The pair, unless its answers differ in nothing that the tokenizer keeps."""
    pair = encode_pair(row, template, max_length)
    if pair is not None and pair.chosen.ids == pair.rejected.ids:
        raise Defect("identical-pair", "the answers are equal as token ids")
    return pair
