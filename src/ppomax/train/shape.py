"""The shape of what a policy does: how its scores, replies and KL have moved since it was SFT.

Beside `observe`, which knows one rollout, this remembers the beginning of the run; what it
remembers is saved in checkpoints.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppomax.experience import kl_penalty
from ppomax.train.experience_batch import Experience, Scored

KEPT = 512
"""Scores of the SFT model kept to compare with."""
OPENING = 4
"""Tokens that make an opening."""
FIT = 10
"""Rows before a line through them says anything."""


class ScoreShape:
    """Scores of the unchanged policy, and the line of score over √KL so far."""

    def __init__(self) -> None:
        self.sft: list[float] = []
        self.sums = [0.0] * 5
        """n, Σx, Σy, Σx², Σxy of x = √KL and y = mean score, over the rows so far."""

    def measure(
        self, experience: Experience, values: Mapping[str, float], *, unchanged: bool
    ) -> dict[str, float]:
        """The metrics of one rollout.

        Args:
            unchanged: the policy that wrote it is still the one the run started from.
        """
        scored = experience.scored
        alive = scored.mask.any(1)
        scores = scored.scores[alive].double()
        if unchanged and len(self.sft) < KEPT:
            self.sft = [*self.sft, *scores.tolist()][:KEPT]
        kept = [row for row, used in enumerate(alive.tolist()) if used]
        responses = [experience.rollout.responses[row] for row in kept]
        found = {
            "reward/score_kurtosis": excess_kurtosis(scores),
            "response/top_opening_share": top_opening_share(responses),
        }
        sft = torch.tensor(self.sft, dtype=torch.float64, device=scores.device)
        found["reward/score_w1"] = wasserstein_1(scores, sft)
        lengths = scored.mask.sum(1)[alive].double()
        found["reward/length_correlation"] = correlation(scores, lengths)
        if scored.ref_logprobs is not None:
            found["kl/ref_k1_se"] = clustered_error(scored)
            residual = self._residual(values["kl/ref_sequence"], values["reward/score_mean"])
            if residual is not None:
                found["reward/sqrt_kl_residual"] = residual
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"sft": list(self.sft), "sums": list(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.sft, self.sums = list(state["sft"]), list(state["sums"])

    def _residual(self, kl: float, score: float) -> float | None:
        """Score less what a line over √KL through the rows before foretells; then joins them."""
        n, x, y, xx, xy = self.sums
        now = math.sqrt(max(kl, 0.0))
        spread = n * xx - x * x
        result = None
        if n >= FIT and spread > 1e-9 * max(n * xx, 1e-9):
            slope = (n * xy - x * y) / spread
            result = score - (y + slope * (n * now - x)) / n
        if math.isfinite(now) and math.isfinite(score):
            self.sums = [n + 1, x + now, y + score, xx + now * now, xy + now * score]
        return result


def skewness(values: Tensor) -> float:
    """Third standardized moment, by the population's variance (g1); 0 where nothing varies."""
    centred = values - values.mean()
    variance = float(centred.square().mean())
    return float(centred.pow(3).mean()) / variance**1.5 if variance > 1e-24 else 0.0


def excess_kurtosis(values: Tensor) -> float:
    """Fourth standardized moment less 3, likewise (g2); 0 where nothing varies."""
    centred = values - values.mean()
    variance = float(centred.square().mean())
    return float(centred.pow(4).mean()) / variance**2 - 3 if variance > 1e-24 else 0.0


def wasserstein_1(first: Tensor, second: Tensor) -> float:
    """∫ |F - G| of two samples, of any sizes: the mean distance that scores have moved."""
    a, b = first.sort().values, second.sort().values
    every = torch.cat([a, b]).sort().values
    widths = every.diff()
    shares = [
        torch.searchsorted(side, every[:-1].contiguous(), right=True).double() / len(side)
        for side in (a, b)
    ]
    return float(((shares[0] - shares[1]).abs() * widths).sum())


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; 0 where one side does not vary."""
    x, y = first - first.mean(), second - second.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-12 else 0.0


def top_opening_share(responses: Sequence[Sequence[int]]) -> float:
    """Share of replies that begin with the most frequent first tokens."""
    counted = Counter(tuple(response[:OPENING]) for response in responses)
    return max(counted.values()) / len(responses)


def clustered_error(scored: Scored) -> float:
    """Standard error of the mean k1 per token, tokens of a response taken as one cluster.

    A ratio estimate (Cochran 1977, §6.3): with s_i the k1 summed over response i of n_i tokens,
    m the mean per token and N tokens in k responses, √(k/(k-1) Σ (s_i - m n_i)²) / N.
    """
    assert scored.ref_logprobs is not None
    k1 = kl_penalty(scored.logprobs, scored.ref_logprobs, scored.mask, estimator="k1").double()
    lengths = scored.mask.sum(1).double()
    used = lengths > 0
    sums, lengths = k1.sum(1)[used], lengths[used]
    clusters, tokens = len(sums), float(lengths.sum())
    if clusters < 2:
        return 0.0
    residuals = sums - sums.sum() / tokens * lengths
    return math.sqrt(clusters / (clusters - 1) * float(residuals.square().sum())) / tokens
