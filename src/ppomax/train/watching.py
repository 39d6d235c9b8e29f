"""The monitors of a PPO run: each row of metrics judged, alarms written down with their evidence.

What is done about a red level is in `recovery`. Every rank judges the same numbers alike.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ppomax.alarms import NumericalAlarms
from ppomax.collapse import CollapseDetector, Judgement
from ppomax.train.loop import StageRun
from ppomax.train.monitor_settings import MonitorSettings
from ppomax.train.ppo_config import PPOConfig

NUM_SAMPLES = 5
"""Replies shown as evidence, from before and from now."""
Verdict = Literal["go", "stop", "rollback"]


class Watch:
    """Detector and alarms, since when what is wrong, which checkpoints are good."""

    def __init__(self, config: PPOConfig, settings: MonitorSettings, run: StageRun) -> None:
        self.settings, self.run = settings, run
        self.detector = CollapseDetector(settings, max_new_tokens=config.sampling.max_new_tokens)
        self.alarms = NumericalAlarms(plain=config.sampling.is_plain)
        self.since: dict[str, int] = {}
        """By signal: the step from which it has stood beyond amber."""
        self.before: list[dict[str, Any]] = []
        """Replies of the last row in which all was well."""
        self.well = True
        """Whether the last row left the level green: the present policy may be exported."""
        self.clean = True
        """Whether its score was below amber too: its replies and its checkpoint count as good."""
        self.green: list[int] = []
        """Numbers of the green checkpoints that are kept, oldest first."""
        self.seconds: dict[int, float] = {}
        """By green checkpoint: its mean held-out score by the second scorer."""
        self.rollbacks = 0

    def judge(
        self,
        step: int,
        values: Mapping[str, float],
        samples: Sequence[Mapping[str, Any]],
        *,
        unchanged: bool,
    ) -> Verdict:
        """Look at a row; events of what is wrong with it.

        Args:
            samples: replies of this row.
            unchanged: they are the SFT model's: they can only say what is normal.
        """
        for alarm in self.alarms.update(values):
            text = f"{alarm.name}: {alarm.reason}"
            self.run.record("alarm", text, step=step, alarm=alarm.name, reason=alarm.reason)
        if unchanged:
            self.detector.learn(values)
            self.before = shown(samples)
            return "go"
        found = self.detector.update(values)
        self._count(step, found)
        self.well = found.level == "green"
        self.clean = self.well and found.score < self.settings.amber
        if found.level != found.before:
            self._tell(step, values, found, samples)
        if self.clean:
            self.before = shown(samples)
        if found.level != "red" or self.settings.action == "log":
            return "go"
        if self.settings.action == "stop" or self.rollbacks >= self.settings.max_rollbacks:
            return "stop"
        return "rollback"

    def reset(self) -> None:
        """The run went back to a good state."""
        self.detector.reset()
        self.alarms.reset()
        self.since, self.well, self.clean = {}, True, True

    def checkpointed(self, number: int | None, second: float | None) -> list[int]:
        """Note a checkpoint about to be written, if it is green; numbers of those to keep.

        Args:
            number: None for one that a signal asked for, which is none to go back to.
            second: its held-out score by the second scorer, where it has one.
        """
        if self.clean and number is not None:
            self.green = [*(n for n in self.green if n < number), number]
            if second is not None:
                self.seconds[number] = second
        return self._keep()

    def exported(self) -> int | None:
        """The checkpoint to export: the best by the second scorer, else the last green one."""
        if self.seconds:
            return max(self.seconds, key=lambda number: (self.seconds[number], number))
        return self.green[-1] if self.green else None

    def went_back(self, number: int) -> None:
        """Forget the checkpoints after this one."""
        self.green = [n for n in self.green if n <= number]
        self.seconds = {n: value for n, value in self.seconds.items() if n <= number}

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "detector": self.detector.state_dict(),
            "alarms": self.alarms.state_dict(),
            "since": self.since,
            "before": self.before,
            "well": self.well,
            "clean": self.clean,
            "green": self.green,
            "seconds": {str(number): value for number, value in self.seconds.items()},
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.detector.load_state_dict(state["detector"])
        self.alarms.load_state_dict(state["alarms"])
        self.since, self.before = dict(state["since"]), list(state["before"])
        self.well, self.clean = state["well"], state.get("clean", state["well"])
        self.green = list(state["green"])
        self.seconds = {int(number): value for number, value in state["seconds"].items()}
        self.rollbacks = state["rollbacks"]

    def _keep(self) -> list[int]:
        """Trim what is remembered to the newest green checkpoints and the best one."""
        self.green = self.green[-self.settings.keep_green :]
        best = max(self.seconds, key=lambda n: (self.seconds[n], n), default=None)
        self.seconds = {n: v for n, v in self.seconds.items() if n in self.green or n == best}
        return sorted({*self.green, *self.seconds})

    def _count(self, step: int, found: Judgement) -> None:
        beyond = [key for key, z in found.deviations.items() if z >= self.settings.amber]
        self.since = {key: self.since.get(key, step) for key in beyond}

    def _tell(
        self,
        step: int,
        values: Mapping[str, float],
        found: Judgement,
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        """The event of a change of level, with all that it rests on."""
        signals = [
            {
                "signal": key,
                "deviation": round(found.deviations[key], 2),
                "now": values[key],
                "usually": statistics.median(row[key] for row in self.detector.rows if key in row),
                "since": since,
            }
            for key, since in self.since.items()
        ]
        self.run.record(
            f"alarm_{found.level}" if found.rose else f"level_{found.level}",
            f"collapse detector {found.before} → {found.level}: "
            + (", ".join([*found.limits, *self.since]) or "signals back to normal"),
            step=step,
            alarm="collapse",
            level=found.level,
            before=found.before,
            score=round(found.score, 2),
            limits=list(found.limits),
            signals=signals,
            samples_before=self.before,
            samples_now=shown(samples),
        )


def shown(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first few replies, with what identifies them."""
    keys = ("step", "id", "response", "score", "length", "truncated")
    return [{key: row[key] for key in keys if key in row} for row in samples[:NUM_SAMPLES]]
