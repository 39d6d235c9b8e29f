"""The forward of a micro-batch of pairs: each answer behind its own prompt, or both behind one.

With a shared prompt a row is prompt, preferred answer, other answer. The other answer takes the
positions of the preferred one and does not see it, so scores and gradients are those of two rows.
Models that read texts as their distinct prefixes share prompts by themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.data.batching import TokenBatch, collate, plan_micro_batches
from ppomax.distributed import World
from ppomax.errors import ConfigError
from ppomax.models.heads import ScalarModel, last_tokens, read_scores
from ppomax.models.language import before_targets
from ppomax.models.logprobs import token_logprobs
from ppomax.models.reading import reads_prefixes
from ppomax.train.pairs import Pair, stack

WORTH_SHARING = 0.2
"""Share of the padded tokens that must go for a shared prompt to be faster on a processor, where
the mask costs something (measured, see docs/LOG.md)."""
LOOKED_AT = 100
"""Steps whose padding decides."""
SAME_SCORE = {torch.float32: 0.001, torch.bfloat16: 0.1}
"""Relative difference of a score that rounding in another order can make, by dtype of weights."""


class PairOutput(NamedTuple):
    """What the losses of a micro-batch need."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    logprobs: Float[Tensor, " tokens"] | None
    """Of the preferred answers' tokens; None where they are not imitated."""


def width(pair: Pair, *, share_prompts: bool) -> int:
    """Padded tokens of a pair that is alone in its micro-batch."""
    if share_prompts:
        return pair.tokens - pair.num_prompt
    return 2 * max(len(pair.chosen.ids), len(pair.rejected.ids))


def plan_pairs(
    pairs: Sequence[Pair], micro_tokens: int, here: World, *, share_prompts: bool
) -> list[list[int]]:
    """Micro-batches of whole pairs; see `plan_micro_batches`."""
    widths = [width(pair, share_prompts=share_prompts) for pair in pairs]
    return plan_micro_batches(widths, micro_tokens, here.size)


def forward_pairs(
    model: ScalarModel,
    pairs: Sequence[Pair],
    pad: int,
    here: World,
    *,
    imitate: bool,
    share_prompts: bool,
) -> PairOutput:
    """Scores of both answers, and log-probs of the preferred one."""
    return (_shared if share_prompts else _apart)(model, pairs, pad, here, imitate)


def _apart(
    model: ScalarModel, pairs: Sequence[Pair], pad: int, here: World, imitate: bool
) -> PairOutput:
    batch = stack(pairs, pad, here, imitate=imitate)
    asked = before_targets(batch) | last_tokens(batch.input_ids, batch.lengths)
    output = model(batch.input_ids, asked=asked, lengths=batch.lengths)
    chosen, rejected = read_scores(output.values, batch.lengths).chunk(2)
    return PairOutput(chosen, rejected, _logprobs(model, output.hidden, batch, asked, imitate))


def _shared(
    model: ScalarModel, pairs: Sequence[Pair], pad: int, here: World, imitate: bool
) -> PairOutput:
    rows = []
    for pair in pairs:
        answer = pair.rejected.ids[pair.num_prompt :]
        rows.append((pair.chosen.ids + answer, pair.chosen.mask + [False] * len(answer)))
    batch = collate(rows, pad, here.device)
    positions, mask = _layout(pairs, batch.input_ids.shape[1], here.device)
    ends = torch.tensor([len(pair.chosen.ids) for pair in pairs], device=here.device)
    asked = before_targets(batch) | last_tokens(batch.input_ids, batch.lengths)
    asked |= last_tokens(batch.input_ids, ends)
    output = model(batch.input_ids, positions, mask, asked=asked)
    return PairOutput(
        read_scores(output.values, ends),
        read_scores(output.values, batch.lengths),
        _logprobs(model, output.hidden, batch, asked, imitate),
    )


def _layout(pairs: Sequence[Pair], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position ids [pairs, longest] and the additive mask [pairs, 1, longest, longest]."""
    slot = torch.arange(longest, device=device)
    prompt = torch.tensor([[pair.num_prompt] for pair in pairs], device=device)
    chosen = torch.tensor([[len(pair.chosen.ids)] for pair in pairs], device=device)
    other = slot >= chosen  # the other answer, and padding behind it
    positions = torch.where(other, slot - chosen + prompt, slot)
    preferred = (slot >= prompt) & ~other
    hidden = (slot[None, :] > slot[:, None]) | (other[:, :, None] & preferred[:, None, :])
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    return positions, mask[:, None]


def _logprobs(
    model: ScalarModel, states: Tensor, batch: TokenBatch, asked: Tensor, imitate: bool
) -> Tensor | None:
    """Log-probs of the preferred answers' tokens.

    Args:
        states: of the tokens that were asked for, row by row.
    """
    if not imitate:
        return None
    return token_logprobs(
        states[before_targets(batch)[asked]],
        model.output_weight(),
        batch.input_ids[:, 1:][batch.targets[:, 1:]],
        entropy=False,
    ).logprobs


def settle_sharing(
    asked: bool | None,
    model: ScalarModel,
    steps: Sequence[Sequence[Pair]],
    micro_tokens: int,
    pad: int,
    here: World,
) -> bool:
    """Whether prompts share a row: as asked, or where it pays and the architecture allows it.

    Raises:
        ConfigError: asked for, and the model scores a pair otherwise then.
    """
    if asked is False:
        return False
    if asked is None and not _pays(model, steps[:LOOKED_AT], micro_tokens, here):
        return False
    pairs = (pair for step in steps for pair in step)
    longest = max(pairs, key=lambda p: width(p, share_prompts=False))  # attention has windows
    try:
        gap = _sharing_error(model, longest, pad, here)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if asked is None:
            return False
        raise ConfigError(
            "setting reward.share_prompts: this model does not take the mask that a shared prompt "
            f"needs ({type(error).__name__}: {str(error).partition(chr(10))[0]}); set it to false"
        ) from error
    if gap <= SAME_SCORE[_exact_dtype(model)]:
        return True
    if asked is None:
        return False
    raise ConfigError(
        "setting reward.share_prompts: this model scores a pair otherwise when its answers share "
        f"the prompt (by {gap:.2g}, relative); set it to false"
    )


def _pays(
    model: ScalarModel, steps: Sequence[Sequence[Pair]], micro_tokens: int, here: World
) -> bool:
    """Whether sharing saves enough padded tokens, on a processor."""
    if here.device.type != "cpu":
        return False

    def computed(*, share: bool) -> int:
        """Tokens; of texts that are read as their prefixes prompts count once, and no padding."""
        total = 0
        for pairs in steps:
            for batch in plan_pairs(pairs, micro_tokens, here, share_prompts=share):
                wide = max(width(pairs[index], share_prompts=share) for index in batch)
                if not share and reads_prefixes(model.backbone, 2 * len(batch), wide // 2):
                    total += sum(width(pairs[index], share_prompts=True) for index in batch)
                else:
                    total += len(batch) * wide
        return total

    return computed(share=True) <= (1 - WORTH_SHARING) * computed(share=False)


@torch.no_grad()
def _sharing_error(model: ScalarModel, pair: Pair, pad: int, here: World) -> float:
    """How far apart the two ways are, as a share of the score: a model may ignore the mask.

    Read in float32 where the weights are: bf16 products alone move a score by several hundredths.
    """
    dtype = _exact_dtype(model)
    with torch.autocast(here.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        apart, shared = (
            forward_pairs(model, [pair], pad, here, imitate=False, share_prompts=share)
            for share in (False, True)
        )
    gaps = [(apart.chosen - shared.chosen).abs(), (apart.rejected - shared.rejected).abs()]
    return float(torch.cat(gaps).max()) / max(1.0, float(apart.chosen.abs()))


def _exact_dtype(model: ScalarModel) -> torch.dtype:
    """float32 where every weight is (adapters may stand on a bf16 model), else bfloat16."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return torch.float32 if dtypes == {torch.float32} else torch.bfloat16
