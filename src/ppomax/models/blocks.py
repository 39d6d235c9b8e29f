"""The repeated layers of a backbone, and which of its parameters are left out of training."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.errors import ConfigError


def block_list(model: nn.Module) -> nn.ModuleList | None:
    """The list that holds the repeated layers of a backbone."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return None
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a backbone."""
    return list(block_list(model) or [])


def lowest_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """The first `count` blocks that a token passes.

    Raises:
        ConfigError: the model has fewer.
    """
    blocks = decoder_blocks(model)
    check_frozen(count, len(blocks))
    return blocks[:count]


def check_frozen(count: int | None, blocks: int) -> None:
    """No more blocks are to be frozen than there are.

    Raises:
        ConfigError: they are.
    """
    if count is not None and count > blocks:
        raise ConfigError(
            f"setting freeze_layers: {count} is more than the model's {blocks} blocks"
        )


def freeze_layers(model: nn.Module, count: int) -> None:
    """Exclude the lowest blocks and all that feeds them, the embeddings, from training.

    What enters block `count` then needs no gradient: backward ends there, and nothing below keeps
    activations. An output head tied to the embedding is frozen with it. Lee et al. 2019
    (1911.03090): training the upper part of a transformer alone keeps most of the quality.

    Raises:
        ConfigError: the model has fewer blocks.
    """
    below = lowest_blocks(model, count)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in (*below, *embeddings):
        module.requires_grad_(requires_grad=False)
    for parameter in _feeding(model, below[-1]):  # norms and projections of embeddings
        parameter.requires_grad_(False)


class _SeenError(Exception):
    """Ends a forward where enough was seen of it."""


@torch.enable_grad()
def _feeding(model: nn.Module, block: nn.Module) -> list[nn.Parameter]:
    """Trained parameters that a block's output depends on."""
    found: list[Tensor] = []

    def see(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401 - as the block
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _SeenError

    backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(backbone.parameters()).device)
    hook = block.register_forward_hook(see)
    try:
        backbone(input_ids=ids, use_cache=False)
    except _SeenError:
        pass
    finally:
        hook.remove()
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    nodes, seen, leaves = [found[0].grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if id(leaf) in trained:
            leaves[id(leaf)] = trained[id(leaf)]
        nodes += [earlier for earlier, _ in node.next_functions]
    return list(leaves.values())
