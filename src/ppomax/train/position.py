"""Where an iteration's update stands, so that a checkpoint may fall between two optimizer steps.

The order of the steps is a function of settings and replies; what must be kept is how many were
taken, what they measured, and the replies themselves.
"""

from dataclasses import dataclass, field
from typing import Any

from ppomax.distributed import World, gather
from ppomax.metrics import MetricSums


@dataclass(slots=True)
class Position:
    """Of the update of one rollout."""

    stage: str
    """`critic` or `ppo`."""
    taken: int = 0
    """Optimizer steps taken, policy's and critic's counted alike."""
    kl: float = 0.0
    """To the sampling policy, as the forward of the policy's last step found it."""
    tokens: int = 0
    """Trained on by this process: prompts and responses, each as often as it was read."""
    sums: MetricSums = field(default_factory=MetricSums)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the phases before the update."""

    def state(self, here: World) -> dict[str, Any]:
        """For a checkpoint's JSON; each rank's own sums (collective)."""
        return {
            "stage": self.stage,
            "taken": self.taken,
            "kl": self.kl,
            "sums": gather(self.sums.state_dict(), here),
            "seconds": self.seconds,
        }

    @classmethod
    def of(cls, state: dict[str, Any], here: World) -> "Position":
        """What `state` described; on another number of ranks the first takes all sums."""
        sums = MetricSums()
        parts = state["sums"]
        as_before = len(parts) == here.size
        for rank, part in enumerate(parts):
            if rank == here.rank if as_before else here.is_main:
                sums.add_state(part)
            else:
                sums.add_keys(part)
        known = {key: state[key] for key in ("stage", "taken", "kl", "seconds")}
        return cls(**known, sums=sums)
