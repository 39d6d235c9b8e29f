"""What a PPO run knows between two optimizer steps, and how a checkpoint holds it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ppomax.checkpoint import Checkpoint
from ppomax.models.language import LanguageModel
from ppomax.normalise import RunningMoments
from ppomax.train.actors import Actors, load_actors
from ppomax.train.buffer import pack, unpack
from ppomax.train.controllers import kl_controller, penalty_controller
from ppomax.train.experience_batch import Experience, Plan
from ppomax.train.loop import StageRun, Trainable
from ppomax.train.memory import fitted
from ppomax.train.position import Position
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import Prompt, PromptStream, TextStream, load_stream
from ppomax.train.shape import ScoreShape
from ppomax.train.tracking import Tracker
from ppomax.train.watching import Watch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Iteration:
    """One rollout and its update."""

    step: int
    """Counted from 1, critic rollouts and PPO iterations each on their own."""
    prompts: list[Prompt]
    """One for each reply."""
    experience: Experience
    plan: Plan
    """Of the first pass over the replies: the micro-batches that were scored."""
    at: Position
    """Where the update stands."""


class PPOState:
    """Actors, running moments, KL coefficient, counters."""

    def __init__(self, config: PPOConfig, run: StageRun) -> None:
        self.config, self.here, self.run = config, run.world, run
        self.actors: Actors = load_actors(config, self.here)
        self.prompts: PromptStream = load_stream(config, self.actors.template)
        self.texts = (
            TextStream(config.ptx, self.actors.template, config.seed, config.max_bad_rows)
            if config.ptx
            else None
        )
        self.moments = RunningMoments()
        self.kl = kl_controller(config)
        self.penalty = penalty_controller(config)
        self.buffer: list[Experience] = []
        """The latest iterations' experience, newest first."""
        self.first_entropy: float | None = None
        """Of the run's first rollout, in nats per token."""
        self.iteration, self.critic_rollouts = 0, 0
        self.critic_ready = config.critic_pretraining is None
        self.taken = 0
        """Prompts taken from the stream so far."""
        self.seconds: dict[str, float] = {}
        """By phase of the iteration."""
        self.score_mean: float | None = None
        """Of the last iteration."""
        self.at: Position | None = None
        """Where the update stands that is under way."""
        self.current: Experience | None = None
        """What it learns from."""
        self.shape = ScoreShape()
        monitor = config.monitor
        self.watch = Watch(config, monitor, run) if monitor else None
        track = monitor.track if monitor else None
        self.tracker = Tracker(config, track, self.actors, self.here) if track else None
        self.second: float | None = None
        """Mean held-out score of the present policy by the second scorer, where it has one."""
        self.stopped = False
        """Whether the monitor ended training."""
        run.restore(self.trained())
        if run.found is not None:
            self.take(run.found)
        else:
            self._tell_notes()

    @property
    def number(self) -> int:
        """Iterations and critic rollouts that are over; what a checkpoint is numbered by."""
        return self.iteration + self.critic_rollouts

    @property
    def policy(self) -> LanguageModel:
        """The trained policy."""
        return self.actors.policy.model

    def trained(self) -> list[Trainable[Any]]:
        """What a checkpoint holds the weights of."""
        critic = self.actors.critic
        return [self.actors.policy, *([critic] if critic is not None else [])]

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Time a phase of the iteration."""
        began = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - began

    def drawn(self, start: int) -> list[Prompt]:
        """A rollout's prompts from place `start` on, each as often as it is answered."""
        drawn = self.prompts.batch(start, self.config.rollout_size)
        return [prompt for prompt in drawn for _ in range(self.config.samples_per_prompt)]

    def fitted(self, step: int, work: Callable[[], T]) -> T:
        """`work`, again with half the micro-batches while memory runs out."""

        def sized(micro_tokens: int) -> T:
            if micro_tokens != self.config.micro_tokens:
                self.config = self.config.model_copy(update={"micro_tokens": micro_tokens})
                self.actors.trunks.forget()
            return work()

        return fitted(self.run, self.trained(), step, sized)

    def save_if_due(self, last: bool) -> None:
        """A checkpoint, if this is the place for one.

        Raises:
            Interrupted: a signal came; the state is saved.
        """
        candidate = self.second is not None
        due = last or candidate or self.number % self.config.checkpoint.every == 0
        if self.run.stop_asked() and not (last and self.iteration):
            raise self.run.stopped(self.number, partial(self.save, due=due))
        if due:
            self.save()

    def save(self, *, due: bool = True) -> None:
        """Everything that is state; inside an update also its replies and the place in it.

        Args:
            due: saved in an undisturbed run too: only such a state may be gone back to or exported.
        """
        within = self.at is not None
        keep = []
        if self.watch is not None:
            number = self.number if due and not within else None
            keep = self.watch.checkpointed(number, self.second)
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "critic_rollouts": self.critic_rollouts,
            "taken": self.taken,
            "critic_ready": self.critic_ready,
            "critic_offset": self.actors.critic.model.offset if self.actors.critic else 0.0,
            "moments": self.moments.state_dict(),
            "kl": self.kl.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "first_entropy": self.first_entropy,
            "quality": None if within else self.score_mean,
            "update": None if self.at is None else self.at.state(self.here),
            "shape": self.shape.state_dict(),
            "watch": self.watch.state_dict() if self.watch else None,
            "sft": self.tracker.sft if self.tracker else None,
            "stopped": self.stopped,
        }
        kept = self.buffer[: self.config.buffer_iterations - 1]
        more = {}
        if self.at is not None and self.current is not None:
            more["current"] = pack(self.current)
            kept = self.buffer[1:] if self.at.stage == "ppo" else self.buffer
        self.run.save(
            self.number + within,
            self.trained(),
            state,
            {"ppo": self.iteration, "critic": self.critic_rollouts},
            more | {f"buffer_{age}": pack(experience) for age, experience in enumerate(kept)},
            keep,
        )

    def take(self, found: Checkpoint) -> None:
        """Go on from a checkpoint whose weights are in place."""
        state = found.state
        self.buffer = [
            unpack(found.tensors(f"buffer_{age}"), self.here.device)
            for age in range(found.count("buffer_"))
        ]
        self.at, self.current = None, None
        if state["update"] is not None:
            self.at = Position.of(state["update"], self.here)
            self.current = unpack(found.tensors("current"), self.here.device)
        self.first_entropy = state["first_entropy"]
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        self.iteration, self.critic_rollouts = state["iteration"], state["critic_rollouts"]
        self.taken, self.critic_ready = state["taken"], state["critic_ready"]
        if self.actors.critic is not None:
            self.actors.critic.model.offset = state.get("critic_offset", 0.0)
        self.moments.load_state_dict(state["moments"])
        self.kl.load_state_dict(state["kl"])
        self.score_mean = state["quality"]
        self.shape.load_state_dict(state["shape"])
        if self.watch is not None:
            self.watch.load_state_dict(state["watch"])
        if self.tracker is not None:
            self.tracker.sft = state["sft"] or self.tracker.sft  # None where it was asked later
        self.stopped, self.second = state["stopped"], None

    def _tell_notes(self) -> None:
        """What a fresh run says of itself before it begins."""
        self.run.set_aside(self.prompts.bad)
        if self.actors.engine.note:
            self.run.event("engine", step=0, note=self.actors.engine.note)
        if not self.config.sampling.is_plain:
            self.run.event(
                "sampler",
                step=0,
                note="top-p, top-k, min-p or a penalty is on: the ratio is to the "
                "trainer's plain distribution, not to the one replies were drawn from",
            )
        for note in self.config.advice():
            self.run.event("advice", step=0, note=note)
