"""Which backbones read texts as their distinct prefixes, and how."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ppomax.models.fused import HOOKS, Fused, compute_dtype, fits, is_plain, parts_of
from ppomax.models.kernels import kernels_for
from ppomax.models.prefixes import Reading, prefixes_of


def reading_of(
    backbone: Any,  # noqa: ANN401 - each architecture's class
    input_ids: Int[Tensor, "batch length"],
    asked: Bool[Tensor, "batch length"],
    lengths: Int[Tensor, " batch"],
) -> Reading | None:
    """How all of a backbone's blocks can read these texts; None where one of them cannot.

    That is another device, long texts, adapters, somebody who watches or replaces a block, and a
    model that is not `transformers`' own and may not hand an argument on to its blocks.

    Raises:
        ValueError: a length is longer than the rows, or something behind a text is asked for.
    """
    batch, length = input_ids.shape
    if not asked.any() or not reads_prefixes(backbone, batch, length):
        return None
    if (asked & (torch.arange(length) >= lengths[:, None])).any():
        raise ValueError("states are asked for behind the end of a text")
    prefixes = prefixes_of(input_ids, lengths)
    rows = torch.zeros(len(prefixes.ids), dtype=torch.bool)
    rows[prefixes.rows[asked]] = True
    return Reading(prefixes, rows.nonzero().flatten(), backbone.layers[-1])


def reads_prefixes(
    backbone: Any,  # noqa: ANN401 - each architecture's class
    batch: int,
    length: int,
) -> bool:
    """Whether so many texts of so many tokens are read as their distinct prefixes."""
    blocks = getattr(backbone, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not blocks:
        return False
    if not all(isinstance(block, Fused) for block in blocks):
        return False
    if not type(backbone).__module__.startswith("transformers.models."):
        return False
    config = backbone.config
    window = getattr(config, "sliding_window", None) or length
    if length > window or not fits(batch, length, config):
        return False
    if len(blocks) != config.num_hidden_layers:  # it runs so many
        return False
    embedding = backbone.get_input_embeddings().weight
    raised = embedding.dtype == torch.float32 or torch.is_autocast_enabled("cpu")
    if embedding.device.type != "cpu" or not raised:
        return False
    watched = (*blocks, backbone.norm, backbone)
    if any(getattr(part, name) for part in watched for name in HOOKS):
        return False
    if "forward" in vars(blocks[-1]):
        return False
    turned = 2 * len(getattr(getattr(backbone, "rotary_emb", None), "inv_freq", ()))
    dtype = compute_dtype()
    return kernels_for(dtype) is not None and all(
        is_plain(block, parts_of(block), dtype, turned) for block in blocks
    )
