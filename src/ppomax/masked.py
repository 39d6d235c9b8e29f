"""Sums, means and moments over the entries a boolean mask selects (True = counts).

Masks select (`torch.where`), they never multiply: what lies outside the mask, nan and inf included,
is never read and gets a gradient of exactly zero. Whatever needs a formula of reinforcement
learning belongs in the modules above; nothing here knows what the numbers mean.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MIN_STD = 1e-8
"""A standard deviation below this is taken for zero (Zheng et al. 2023, released code)."""


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a sample, in double precision.

    Mergeable in any order with `merge_moments`: over micro-batches, ranks and iterations.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants here
    mean: float
    m2: float
    """Sum of squared deviations from the mean; m2 / (count - 1) is the unbiased variance."""


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of the selected entries; 0.0 where none is."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the selected entries; 0.0 where the mask selects none.

    For reports over a whole batch. A loss divides `masked_sum` by a denominator its caller passes,
    because means of micro-batches do not average to the mean of the batch.
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_max(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, empty: float | int
) -> Float[Tensor, ""]:
    """Largest selected entry; `empty` where the mask selects none."""
    filled = torch.where(mask, x, -torch.inf).flatten()
    highest = torch.cat([filled, filled.new_full((1,), -torch.inf)]).amax()
    return torch.where(mask.any(), highest, empty)


def masked_moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Moments:
    """Moments of the selected entries, by two passes in double precision.

    Plain numbers without gradient; Moments(0, 0.0, 0.0) where the mask selects none.
    """
    selected = x[mask].double()
    count = selected.numel()
    if count == 0:
        return Moments(0, 0.0, 0.0)
    mean = selected.sum() / count
    return Moments(count, mean.item(), (selected - mean).square().sum().item())


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of two samples taken together.

    Chan, Golub & LeVeque 1979, with d = mean_b - mean_a and n = n_a + n_b:

        mean = mean_a + d n_b / n        m2 = m2_a + m2_b + d^2 n_a n_b / n
    """
    count = a.count + b.count
    if count == 0:
        return Moments(0, 0.0, 0.0)
    difference = b.mean - a.mean
    return Moments(
        count=count,
        mean=a.mean + difference * (b.count / count),
        m2=a.m2 + b.m2 + difference**2 * a.count * b.count / count,
    )


def unbiased_std(moments: Moments) -> float:
    """Unbiased standard deviation, safe to divide by: 1.0 where count < 2 or it is below 1e-8."""
    if moments.count < 2:
        return 1.0
    std = math.sqrt(moments.m2 / (moments.count - 1))
    return 1.0 if std < MIN_STD else std


def masked_whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    moments: Moments | None = None,
    shift_mean: bool = True,
) -> Float[Tensor, "*shape"]:
    """Selected entries at mean 0 and unbiased variance 1; 0 outside the mask.

    Zheng et al. 2023, Figure 5, detail 6. A constant sample (std below 1e-8, or one entry) is
    centred and divided by 1.

    Args:
        moments: of the whole minibatch, merged over micro-batches and ranks, so that the result
            does not depend on the split. None: of this tensor alone. Constants to autograd.
        shift_mean: False only divides by the standard deviation; no mean is taken away, and none
            is ever added back.
    """
    moments = masked_moments(x, mask) if moments is None else moments
    shift = moments.mean if shift_mean else 0.0
    return torch.where(mask, (x - shift) / unbiased_std(moments), 0.0)


def last_index(mask: Bool[Tensor, "batch response"]) -> Int[Tensor, " batch"]:
    """Column of each row's last True; -1 in a row that has none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    before_all = columns.new_full((mask.shape[0], 1), -1)  # so that no row is empty
    return torch.cat([before_all, torch.where(mask, columns, -1)], dim=1).amax(dim=1)
