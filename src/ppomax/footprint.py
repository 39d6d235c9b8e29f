"""What a model takes: its shape from its config, and memory counted from the shape.

fp32 masters, gradients and two AdamW moments of what is trained, and what the layers of a Llama
keep for backward. `benchmarks/memory.py` holds it against what runs take.
"""

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ppomax.errors import ModelError
from ppomax.models.attention import LONGEST, MOST_SCORES
from ppomax.models.fused import is_fused, use_fused_blocks
from ppomax.models.kernels import kernels_for
from ppomax.models.lean import is_lean, use_lean_blocks
from ppomax.models.load import positions_of
from ppomax.models.logprobs import chunk_elements, part_width
from ppomax.models.lora import LoraSettings
from ppomax.models.names import resolve

GB = 1e9


@dataclass(frozen=True, slots=True)
class Size:
    """A causal LM's size."""

    parameters: int
    embedding: int
    layers: int
    hidden: int
    kv_width: int
    """Of keys and values together."""
    vocab: int
    q_width: int
    intermediate: int
    positions: int | None = None
    """Longest sequence it can read, where its config says."""
    lean: bool = False
    """Whether its blocks keep less for backward (models/lean.py)."""
    fused: bool = False
    """Whether they run as one operation, which keeps less still (models/fused.py)."""
    heads: int = 0
    """Of queries."""


def model_size(name: str, *, trust_remote_code: bool = False) -> Size:
    """Size from the config alone; no weights are read.

    Raises:
        ModelError: the model cannot be found.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        use_lean_blocks(model)
        use_fused_blocks(model)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"model {name!r}: its config cannot be read ({first[:200]})") from None
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=config.vocab_size * config.hidden_size,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv_width=2 * kv * head_dim,
        q_width=heads * head_dim,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size,
        positions=positions_of(config),
        heads=heads,
        lean=is_lean(model),
        fused=is_fused(model) and not torch.cuda.is_available(),
    )


def trained_gb(
    size: int, lora: LoraSettings | None, shape: Size, compute: torch.dtype, frozen: int = 0
) -> float:
    """GB of weights, gradient and moments of a trained model.

    Args:
        frozen: lowest blocks that are not trained, nor the embedding then.
    """
    share = frozen / shape.layers
    if lora is None:
        left = share * (shape.parameters - shape.embedding) + (shape.embedding if frozen else 0)
        return (16 * size - 12 * left) / GB
    adapters = (1 - share) * adapter_parameters(lora, shape)
    return (size * torch.finfo(compute).bits / 8 + 16 * adapters) / GB


def adapter_parameters(lora: LoraSettings, shape: Size) -> int:
    """About the size of adapters on every linear layer."""
    matrices = shape.parameters - shape.embedding
    return int(lora.rank * 2 * matrices / shape.hidden * 0.8)


def kept_bytes(shape: Size, compute: torch.dtype) -> int:
    """Bytes that a layer keeps of each token until backward.

    In fp32 inputs and normalised inputs of both norms; in the compute dtype queries, keys, values,
    mixed values, gate, its activation, up, their product, and the inputs of the matrix products:
    one tensor for q, k, v and one for gate and up, but under autocast each product casts its own.
    Lean blocks keep no normalised input, no activation and one cast for all; fused ones also make
    the product and the norms again.
    """
    if shape.fused:
        products = 2 * shape.q_width + shape.kv_width + 2 * shape.intermediate
        return 8 * shape.hidden + compute.itemsize * products
    if shape.lean:
        products = 2 * shape.hidden + 2 * shape.q_width + shape.kv_width + 3 * shape.intermediate
        return 8 * shape.hidden + compute.itemsize * products
    inputs = 2 if compute == torch.float32 else 5
    products = inputs * shape.hidden + 2 * shape.q_width + shape.kv_width + 4 * shape.intermediate
    return 16 * shape.hidden + compute.itemsize * products


HOLES = 1.25
"""What freed blocks of other sizes add: of 1.9 GB asked for glibc's allocator held 1.9 to 2.4."""


def kept_gb(
    tokens: int,
    shape: Size,
    compute: torch.dtype,
    *,
    checkpointing: bool,
    frozen: int = 0,
    adapters: bool = False,
) -> float:
    """GB that a micro-batch's forward holds until backward, and one layer of it made anew.

    Args:
        tokens, frozen, adapters: as for `activations_gb`.
    """
    layer = kept_bytes(replace(shape, fused=False) if adapters else shape, compute)
    layers = shape.layers - frozen
    held = layer * (layers + 1)
    if checkpointing:
        held = 4 * shape.hidden * layers + 2 * layer  # the inputs; one layer is made anew
    return HOLES * tokens * held / GB


def activations_gb(
    tokens: int,
    shape: Size,
    compute: torch.dtype,
    *,
    checkpointing: bool,
    trained: bool = True,
    frozen: int = 0,
    adapters: bool = False,
    length: int = 0,
) -> float:
    """GB held between forward and backward of one micro-batch, and what backward makes beside it.

    That is the gradients of the layer it is in, and of the embedding beside the output matrix's.

    Args:
        tokens: in the largest micro-batch, padding included.
        trained: the weights themselves are; with adapters they have no gradient.
        frozen: lowest blocks that backward does not reach; they keep nothing.
        adapters: blocks have some, and do not run as one operation.
        length: tokens of a row; those of fused blocks have the square of it in scores.
    """
    if adapters:
        shape = replace(shape, fused=False)
    squares = tokens * length * shape.heads if shape.fused and length <= LONGEST else 0
    scores = 2 * compute.itemsize * (squares if squares <= MOST_SCORES else 0)
    layers = shape.layers - frozen
    held = kept_gb(
        tokens,
        shape,
        compute,
        checkpointing=checkpointing,
        frozen=frozen,
        adapters=adapters,
    )
    casts = compute.itemsize * (shape.parameters - shape.embedding) * layers // shape.layers
    if checkpointing or shape.fused:
        casts //= max(1, layers)  # made anew in backward
    once = (casts if compute != torch.float32 else 0) + (4 * shape.embedding if trained else 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = device == "cpu" and kernels_for(compute) is not None
    if compiled:  # a part's logits, whose gradient takes their place
        logits = compute.itemsize * tokens * min(part_width(tokens), shape.vocab)
    else:  # a chunk's logits, slope and gradient, the last chunk's two, and a cast copy
        logits = 5 * 4 * min(tokens * shape.vocab, chunk_elements(device))
    return held + HOLES * (once + logits + scores) / GB
