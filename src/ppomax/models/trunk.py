"""Frozen lowest blocks that several models have in common: held once, computed once per batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ppomax.models.blocks import block_list
from ppomax.models.heads import ScalarModel, backbone_of, hidden_states
from ppomax.models.language import LanguageModel

Model = LanguageModel | ScalarModel

PROBE_TOKENS = 64
"""Of a text that two models must read alike before they share."""
HEADS = {
    *("architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version"),
    *("num_labels", "id2label", "label2id", "problem_type", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "output_hidden_states", "return_dict"),
}
"""Keys of a config that say nothing of its blocks."""
REMEMBERED_BYTES = 2**30
"""The most that a trunk remembers; what is beyond that is computed again."""


class Trunk:
    """The lowest blocks of one or more models, which remembers what it made of a batch.

    Exact: what is remembered is the blocks' own output for the very same ids, so nothing changes
    but the time. It holds for blocks that are never trained; `forget` only frees memory.
    """

    def __init__(self, owner: Model, count: int) -> None:
        self.owner, self.count = owner, count
        self._found: dict[object, Any] = {}
        """The last block's output by batch."""
        self._bytes = 0
        self._batch: object | None = None
        """The batch that is read now; None: read as if there were no trunk."""
        self._installed = False
        if any(parameter.requires_grad for parameter in owner.parameters()):
            self._install(owner)  # it reads a batch for scoring, and again for the update

    def join(self, model: Model) -> bool:
        """Give a model this trunk, and drop its own copy, if the two agree in every bit."""
        if not _alike(self.owner, model, self.count):
            return False
        blocks, kept = _blocks(model), _blocks(self.owner)
        for index in range(self.count):
            blocks[index] = kept[index]
        for own, other in zip(_embeddings(model), _embeddings(self.owner), strict=True):
            weight = own.weight
            for module in model.modules():  # a tied output head is the embedding
                if module._parameters.get("weight") is weight:
                    module.weight = other.weight
        _leave_file(model, {id(parameter) for parameter in self.owner.parameters()})
        self._install(self.owner)
        self._install(model)
        return True

    @contextmanager
    def reading(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Iterator[None]:
        """Within, a forward of these ids begins above the trunk if they were read before.

        Args:
            lengths: of texts that are read as their distinct prefixes; None: each token is read.
        """
        device = input_ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ids = input_ids.cpu().numpy().tobytes()
        spans = None if lengths is None else tuple(lengths.tolist())
        self._batch = (tuple(input_ids.shape), ids, spans, dtype)
        try:
            yield
        finally:
            self._batch = None

    def forget(self) -> None:
        """Drop what was remembered."""
        self._found.clear()
        self._bytes = 0

    def __deepcopy__(self, _memo: object) -> "Trunk":
        """Refused: a copied model's blocks would still be those of the one it was copied from."""
        raise TypeError("a model that shares a trunk cannot be copied")

    def __len__(self) -> int:
        """How many batches are remembered."""
        return len(self._found)

    def _install(self, model: Model) -> None:
        _backbone(model).trunk = self
        if self._installed:
            return
        self._installed = True
        for index, block in enumerate(list(_blocks(model))[: self.count]):
            block.forward = self._remembering(block.forward, last=index == self.count - 1)

    def _remembering(self, forward: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        @wraps(forward)
        def run(hidden: Tensor, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - as the block
            found = self._found.get(self._batch)
            if found is not None:
                if last:
                    return found
                return (hidden, *found[1:]) if isinstance(found, tuple) else hidden
            output = forward(hidden, *args, **kwargs)
            if last and self._batch is not None:
                output = _constant(output)
                self._bytes += hidden.nbytes
                if self._bytes <= REMEMBERED_BYTES:
                    self._found[self._batch] = output
            return output

        return run


def _leave_file(model: Model, shared: set[int]) -> None:
    """Copy what a model keeps for itself, on a processor.

    It may lie in a file that is mapped into memory, which as a whole, with the blocks that were
    dropped, stays there as long as one weight does.
    """
    for parameter in model.parameters():
        if id(parameter) not in shared and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _constant(output: Any) -> Any:  # noqa: ANN401 - as the block gives it
    """Cut from any graph: checkpointing makes the embeddings' output ask for a gradient."""
    if isinstance(output, tuple):
        return (output[0].detach(), *output[1:])
    return output.detach()


class Trunks:
    """What models that are loaded one after the other have in common below.

    Those of a reward model, a critic, a reference and a policy agree where all were trained with
    the same `freeze_layers` from one base. Models of another dtype, or that were not, keep their
    own; a trained one among those then shares its trunk between scoring and update.
    """

    def __init__(self, count: int) -> None:
        """Args: count: of blocks; with 0 nothing is shared."""
        self.count = count
        self.each: list[Trunk] = []

    def add(self, model: Model) -> None:
        """Let a placed model, frozen below and not sharded, share with those before it."""
        if not self.count or not _shareable(model, self.count):
            return
        if not any(trunk.join(model) for trunk in self.each):
            self.each.append(Trunk(model, self.count))

    def forget(self) -> None:
        """Drop what was remembered of batches that do not come again."""
        for trunk in self.each:
            trunk.forget()


def common_depth(one: Model, other: Model) -> int:
    """How many of the lowest blocks agree in every bit; 0 if the embeddings do not."""
    if not _shareable(one, 0) or not _shareable(other, 0):
        return 0
    found = 0
    for blocks in zip(_blocks(one), _blocks(other), strict=False):
        own, others = (list(block.state_dict().items()) for block in blocks)
        if not _equal(own, others):
            break
        found += 1
    return found if found and _alike(one, other, found) else 0


def _alike(one: Model, other: Model, count: int) -> bool:
    """Same weights below, and the same reading of a text: positions, norms, activations."""
    if not _shareable(other, count) or _differ(one, other):
        return False
    if not _equal(_below(one, count), _below(other, count)):
        return False
    return torch.equal(_probe(one, count), _probe(other, count))


def _shareable(model: Model, count: int) -> bool:
    """It has so many blocks, and none above reads what one below keeps for it."""
    config = _backbone(model).config
    return len(_blocks(model)) >= count and not getattr(config, "num_kv_shared_layers", 0)


def _differ(one: Model, other: Model) -> bool:
    """Whether the configs say something else of how a text is read, beyond the probe's length."""
    a, b = (_backbone(model).config.to_dict() for model in (one, other))
    return any(a[key] != b[key] for key in set(a) & set(b) - HEADS)


def _equal(weights: list[tuple[str, Tensor]], others: list[tuple[str, Tensor]]) -> bool:
    if [name for name, _ in weights] != [name for name, _ in others]:
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(weights, others, strict=True)]
    return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _below(model: Model, count: int) -> list[tuple[str, Tensor]]:
    """Everything that feeds the block above the trunk, by name."""
    found = [
        (f"embedding.{index}.{name}", tensor)
        for index, module in enumerate(_embeddings(model))
        for name, tensor in module.state_dict().items()
    ]
    for index, block in enumerate(list(_blocks(model))[:count]):
        found += [(f"{index}.{name}", tensor) for name, tensor in block.state_dict().items()]
    return found


@torch.no_grad()
def _probe(model: Model, count: int) -> Tensor:
    """What the last block of the trunk says of a fixed text, fp32."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401 - as the block
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = _blocks(model)[count - 1].register_forward_hook(see)
    vocabulary = min(module.num_embeddings for module in _embeddings(model))
    positions = getattr(_backbone(model).config, "max_position_embeddings", None) or PROBE_TOKENS
    length = min(PROBE_TOKENS, positions)
    places = torch.arange(length, device=next(model.parameters()).device)[None]
    try:  # with positions given no trunk comes between
        hidden_states(_backbone(model), places % vocabulary, position_ids=places)
    finally:
        hook.remove()
    return seen[0].float()


def _backbone(model: Model) -> Any:  # noqa: ANN401 - transformers' untyped modules
    return backbone_of(model.lm if isinstance(model, LanguageModel) else model.backbone)


def _blocks(model: Model) -> nn.ModuleList:
    found = block_list(model)
    assert found is not None, "freeze_layers counts blocks"
    return found


def _embeddings(model: Model) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]
