"""Experience as tensors in a checkpoint, and back: what a buffer of several iterations needs."""

from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ppomax.rollout.engine import Rollout
from ppomax.train.experience_batch import Experience, Scored


def pack(experience: Experience) -> dict[str, Tensor]:
    """Every table by its name, ragged lists as flat values with lengths."""
    rollout, scored = experience.rollout, experience.scored
    packed = {"finished": torch.tensor(rollout.finished)}
    for name in ("prompts", "responses", "logprobs"):
        rows = getattr(rollout, name)
        packed[f"{name}_lengths"] = torch.tensor([len(row) for row in rows])
        kind = torch.float64 if name == "logprobs" else torch.int64
        packed[name] = torch.tensor([value for row in rows for value in row], dtype=kind)
    packed |= _tensors("scored", scored) | _tensors("experience", experience)
    packed["kl_coef"] = torch.tensor(experience.kl_coef, dtype=torch.float64)
    return packed


def unpack(packed: dict[str, Tensor], device: torch.device) -> Experience:
    """The experience that `pack` took apart."""
    rows: dict[str, Any] = {}
    for name in ("prompts", "responses", "logprobs"):
        values = iter(packed[name].tolist())
        rows[name] = [list(islice(values, length)) for length in packed[f"{name}_lengths"].tolist()]
    scored = Scored(**_named("scored", Scored, packed, device))
    tables = _named("experience", Experience, packed, device)
    tables["rollout"] = Rollout(**rows, finished=packed["finished"].tolist())
    tables |= {"scored": scored, "kl_coef": float(packed["kl_coef"])}
    return Experience(**tables)


def _tensors(prefix: str, record: Scored | Experience) -> dict[str, Tensor]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {  # memory of their own: two tables may be one, and no file holds the same twice
        f"{prefix}.{name}": value.clone()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _named(
    prefix: str,
    kind: type[Scored | Experience],
    packed: dict[str, Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Fields of a record; None where nothing was packed under their name."""
    found = {field.name: packed.get(f"{prefix}.{field.name}") for field in fields(kind)}
    return {name: None if value is None else value.to(device) for name, value in found.items()}
