"""Running mean and standard deviation of the scores: state that a checkpoint must hold.

The only state in the mathematics. It never sees a mask, a device or a rank: callers merge the
moments of every rank's scores and hand them in.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.masked import Moments, masked_moments, merge_moments, unbiased_std


class RunningMoments:
    """Historical mean and std over all samples so far (Zheng et al. 2023, eq. 18).

    Kept as plain double-precision numbers and merged by Chan's formula, so that any order and any
    split of the samples gives the two-pass result. Scores must be finite: one nan stays for ever.
    """

    def __init__(self) -> None:
        self._moments = Moments(0, 0.0, 0.0)

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in every entry of `x`."""
        self.merge(masked_moments(x, torch.ones_like(x, dtype=torch.bool)))

    def merge(self, moments: Moments) -> None:
        """Take in a sample by its moments, for instance merged over ranks."""
        self._moments = merge_moments(self._moments, moments)

    @property
    def count(self) -> int:
        """Samples so far."""
        return self._moments.count

    @property
    def mean(self) -> float:
        """Mean of all samples so far; 0.0 before the first."""
        return self._moments.mean

    @property
    def std(self) -> float:
        """Unbiased std, safe to divide by: 1.0 where count < 2 or it is below 1e-8."""
        return unbiased_std(self._moments)

    def state_dict(self) -> dict[str, float | int]:
        """Count, mean and m2: plain numbers that JSON keeps exactly."""
        return dict(self._moments._asdict())

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from what `state_dict` gave."""
        self._moments = Moments(int(state["count"]), float(state["mean"]), float(state["m2"]))
