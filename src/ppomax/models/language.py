"""A causal LM read one way only: log-probs and entropy of the target tokens of a batch."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax import distributed
from ppomax.data.batching import TokenBatch
from ppomax.distributed import World
from ppomax.models.blocks import decoder_blocks
from ppomax.models.exact_kl import TargetStates, token_kl
from ppomax.models.heads import ScalarModel, last_tokens, output_weight, states_of
from ppomax.models.logprobs import token_logprobs
from ppomax.models.lora import has_lora


class TargetReading(NamedTuple):
    """What a model says of a batch's target tokens, flat, row by row; see `TokenLogprobs`."""

    logprobs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    plain: Float[Tensor, " tokens"]
    ref_kl: Float[Tensor, " tokens"] | None
    """Exact KL to the reference, where its states were given."""


class LanguageModel(nn.Module):
    """A causal LM whose `forward` is all that training needs (and all that sharding wraps)."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        batch: TokenBatch,
        temperature: float = 1.0,
        *,
        entropy: bool = False,
        reference: TargetStates | None = None,
    ) -> TargetReading:
        """Log-probs of the batch's target tokens, flat, row by row.

        The first token of a sequence has nothing before it and can be no target.

        Args:
            reference: another model's states at the same targets, to measure the exact KL to.
        """
        own = self._states(batch)
        targets = batch.input_ids[:, 1:][batch.targets[:, 1:]]
        found = token_logprobs(
            own.hidden, own.weight, targets, temperature=temperature, entropy=entropy
        )
        if reference is None:
            return TargetReading(*found, ref_kl=None)
        return TargetReading(*found, token_kl(own, reference, temperature=temperature))

    @torch.no_grad()
    def states(self, batch: TokenBatch) -> TargetStates:
        """What the next-token distributions at the targets are made of, as constants."""
        hidden, weight = self._states(batch)
        # a sharded output matrix is whole in the forward only
        return TargetStates(hidden, weight.clone() if distributed.is_wrapped(self) else weight)

    def _states(self, batch: TokenBatch) -> TargetStates:
        states = states_of(self.lm, batch.input_ids, before_targets(batch), batch.lengths)
        return TargetStates(states, output_weight(self.lm))


def before_targets(batch: TokenBatch) -> Bool[Tensor, "batch sequence"]:
    """The left neighbours of target tokens, in whose states these are chosen."""
    return F.pad(batch.targets[:, 1:], (0, 1))


def values_before_targets(model: ScalarModel, batch: TokenBatch) -> torch.Tensor:
    """V of the state in which each target token was chosen (its left neighbour), flat, fp32."""
    return values_of_replies(model, batch)[0]


def values_of_replies(
    model: ScalarModel, batch: TokenBatch
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " batch"]]:
    """`values_before_targets`, and V after each row's last token; fp32."""
    asked = before_targets(batch) | last_tokens(batch.input_ids, batch.lengths)
    values = model(batch.input_ids, asked=asked, lengths=batch.lengths).values
    rows = torch.arange(len(values), device=values.device)
    return values[:, :-1][batch.targets[:, 1:]], values[rows, batch.lengths - 1]


def freeze_embeddings(model: LanguageModel | ScalarModel) -> None:
    """Exclude the token embedding, and with it a tied output head, from training."""
    backbone = model.lm if isinstance(model, LanguageModel) else model.backbone
    backbone.get_input_embeddings().requires_grad_(requires_grad=False)


def place(model: LanguageModel | ScalarModel, world: World, *, checkpointing: bool = False) -> None:
    """Move a finished model to its device and shard it where there are several ranks.

    Models with adapters (frozen base, mixed dtypes) are replicated instead.
    """
    model.to(world.device)
    if checkpointing:
        # Any: transformers leaves the method untyped
        backbone: Any = model.lm if isinstance(model, LanguageModel) else model.backbone
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # dropout is 0; transformers recomputes only in this mode
    if not has_lora(model) and len({p.dtype for p in model.parameters()}) == 1:
        methods = ("states",) if isinstance(model, LanguageModel) else ()
        distributed.shard(model, world, decoder_blocks(model), methods)
