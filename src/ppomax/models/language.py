"""A causal LM read one way only: log-probs and entropy of the target tokens of a batch."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppomax import distributed
from ppomax.data.batching import TokenBatch
from ppomax.distributed import World
from ppomax.models.heads import ScalarModel, hidden_states, output_weight
from ppomax.models.logprobs import TokenLogprobs, token_logprobs
from ppomax.models.lora import has_lora


class LanguageModel(nn.Module):
    """A causal LM whose `forward` is all that training needs (and all that sharding wraps)."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self, batch: TokenBatch, temperature: float = 1.0, *, entropy: bool = False
    ) -> TokenLogprobs:
        """Log-probs of the batch's target tokens, flat, row by row.

        The first token of a sequence has nothing before it and can be no target.
        """
        hidden = hidden_states(self.lm, batch.input_ids)
        at_targets = batch.targets[:, 1:]
        return token_logprobs(
            hidden[:, :-1][at_targets],
            output_weight(self.lm),
            batch.input_ids[:, 1:][at_targets],
            temperature=temperature,
            entropy=entropy,
        )


def values_before_targets(model: ScalarModel, batch: TokenBatch) -> torch.Tensor:
    """V of the state in which each target token was chosen (its left neighbour), flat, fp32."""
    values = model(batch.input_ids).values
    result: torch.Tensor = values[:, :-1][batch.targets[:, 1:]]
    return result


def freeze_embeddings(model: LanguageModel | ScalarModel) -> None:
    """Exclude the token embedding, and with it a tied output head, from training."""
    backbone = model.lm if isinstance(model, LanguageModel) else model.backbone
    backbone.get_input_embeddings().requires_grad_(requires_grad=False)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a backbone."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return []
    largest = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))
    return list(largest)


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
        distributed.shard(model, world, decoder_blocks(model))
