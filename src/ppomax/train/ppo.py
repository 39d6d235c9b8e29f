"""PPO-max (Zheng et al. 2023, §5.4): sample, score, estimate, update, observe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ppomax.checkpoint import Checkpoint
from ppomax.data.batching import plan_micro_batches
from ppomax.distributed import World, gather, state_on_main
from ppomax.errors import TrainingError
from ppomax.masked import masked_mean
from ppomax.metrics import MetricSums
from ppomax.models.export import Card, export_policy
from ppomax.models.language import LanguageModel
from ppomax.normalise import RunningMoments
from ppomax.rollout.engine import Rollout, merge_rollouts
from ppomax.train.actors import Actors, check_entropy, load_actors
from ppomax.train.buffer import pack, unpack
from ppomax.train.controllers import kl_controller, penalty_controller
from ppomax.train.estimates import estimate
from ppomax.train.experience_batch import (
    Experience,
    Plan,
    Scored,
    exact_kl,
    plan_updates,
    score,
)
from ppomax.train.guard import without_non_finite
from ppomax.train.loop import StageRun, Trainable, opened
from ppomax.train.memory import fitted
from ppomax.train.observe import observe, sample_rows, timing
from ppomax.train.position import Position
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import Prompt, PromptStream, TextStream, load_stream, reply_seeds
from ppomax.train.recovery import begin_watch, judge, roll_back, take_best, track
from ppomax.train.shape import ScoreShape
from ppomax.train.stopping import StopAsked
from ppomax.train.tracking import Tracker
from ppomax.train.update import Updating, update_critic, update_policy
from ppomax.train.watching import Verdict, Watch

T = TypeVar("T")


def train_ppo(config: PPOConfig, *, resume: bool = False) -> Path:
    """Run the stage; returns its run directory, with the policy in `export/`."""
    with opened("ppo", config, resume=resume) as run:
        trainer = PPO(config, run.world, run)
        trainer.pretrain_critic()
        trainer.train()
        trainer.export()
        return run.finish()


class PPO:
    """The stage's state: actors, running moments, KL coefficient, counters."""

    def __init__(self, config: PPOConfig, here: World, run: StageRun) -> None:
        self.config, self.here, self.run = config, here, run
        self.actors: Actors = load_actors(config, here)
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
        self.tracker = Tracker(config, track, self.actors, here) if track else None
        self.second: float | None = None
        """Mean held-out score of the present policy by the second scorer, where it has one."""
        self.stopped = False
        """Whether the monitor ended training."""
        self._restore()
        fresh = run.found is None
        if fresh:
            run.set_aside(self.prompts.bad)
        if fresh and self.actors.engine.note:
            run.event("engine", step=0, note=self.actors.engine.note)
        if fresh and not config.sampling.is_plain:
            run.event(
                "sampler",
                step=0,
                note="top-p, top-k, min-p or a penalty is on: the ratio is to the "
                "trainer's plain distribution, not to the one replies were drawn from",
            )
        for note in config.advice() if fresh else []:
            run.event("advice", step=0, note=note)

    # --- the iteration ------------------------------------------------------------------------

    def train(self) -> None:
        """All PPO iterations from where the run stands."""
        self.run.stage = "ppo"
        begin_watch(self)
        while self.iteration < self.config.iterations and not self.stopped:
            step = self.iteration + 1
            at, prompts, experience, plan = self.begin("ppo", step)
            self.buffer = [experience, *self.buffer][: self.config.buffer_iterations]
            with self.clock("update"):
                self.update(at, plan, step)
                self.actors.engine.sync(self.policy.lm)
            values = observe(experience, self.config) | at.sums.merged(self.here)
            first = step == 1
            values |= self.shape.measure(experience, values, unchanged=first)
            values |= track(self, step)
            passes = self.config.epochs * len(self.buffer)
            values |= timing(self.seconds, experience, passes, self.here)
            self.kl.update(self._kl_in_unit(values), self.config.replies)
            self.iteration, self.at, self.current = step, None, None
            self.score_mean = values["reward/score_mean"]
            self.run.log(step, values, total=self.config.iterations)
            if step % self.config.log.samples_every == 0 or step in (1, self.config.iterations):
                rows = sample_rows(
                    experience,
                    prompts,
                    self.actors,
                    self.config.log.samples,
                    step=step,
                    attempt=self.run.attempt,
                )
                self.run.samples(rows)
            self._end_of_iteration(judge(self, experience, prompts, values, step), step)
        self.run.all_saved()

    def begin(self, stage: str, step: int) -> tuple[Position, list[Prompt], Experience, Plan]:
        """An update from its first step; from where it stood, if a checkpoint fell inside it.

        Raises:
            Interrupted: a signal came before anything of this iteration touched the state.
        """
        if self.at is not None and self.current is not None:
            experience = self.current
            prompts = self.drawn(self.taken - self.config.rollout_size)
            plan = plan_updates(experience.rollout, self.config, self.here, stage, step, 0)
            self.seconds = dict(self.at.seconds)
            self._say_set_aside(prompts, experience, step)
            return self.at, prompts, experience, plan
        try:
            prompts, experience, plan = self.collect(stage, step)
        except StopAsked:
            raise self.run.stopped(self.number, partial(self.save, due=False)) from None
        self.at, self.current = Position(stage, seconds=dict(self.seconds)), experience
        return self.at, prompts, experience, plan

    def drawn(self, start: int) -> list[Prompt]:
        """A rollout's prompts from place `start` on, each as often as it is answered."""
        drawn = self.prompts.batch(start, self.config.rollout_size)
        return [prompt for prompt in drawn for _ in range(self.config.samples_per_prompt)]

    def collect(self, stage: str, step: int) -> tuple[list[Prompt], Experience, Plan]:
        """Sample, score, estimate: one rollout's experience and the plan of its update."""
        prompts = self.drawn(self.taken)
        with self.clock("rollout"):
            rollout = self.sample(prompts, stage, step)
        with self.clock("score"):
            plan, scored = self._fitted(step, lambda: self._scored(rollout, prompts, stage, step))
            exact = self._exact_kl(rollout)
        if self.run.stop_asked():  # nothing of this iteration has touched the state yet
            raise StopAsked
        config = self.config
        scored, defects = without_non_finite(scored)
        for index, defect in defects.items():
            self.run.event("non_finite", step=step, id=prompts[index].row.id, reason=defect)
        if not scored.mask.any():
            texts = [self.actors.template.decode(ids) for ids in rollout.responses]
            place = self.run.keep_batch(stage, step, texts)
            why = next(iter(defects.values()), "the reward gave no score")
            raise TrainingError(
                f"{self.run.path}: all {len(prompts)} replies of {stage} rollout {step} are set "
                f"aside ({why}); nothing is left to learn from. They are in {place}"
            )
        experience = estimate(rollout, scored, self.moments, self.kl, config)
        experience = replace(experience, exact_kl=exact)
        if not experience.mask.any():
            raise TrainingError(
                f"{self.run.path}: all {len(prompts)} replies of {stage} rollout {step} were cut "
                "at the length limit and advantage.missing_eos: drop leaves nothing to learn from; "
                "raise sampling.max_new_tokens"
            )
        if self.first_entropy is None:
            self.first_entropy = float(masked_mean(scored.entropy, scored.mask))
        self.taken += config.rollout_size
        self._say_set_aside(prompts, experience, step)
        return prompts, experience, plan

    def _scored(
        self, rollout: Rollout, prompts: list[Prompt], stage: str, step: int
    ) -> tuple[Plan, Scored]:
        plan = plan_updates(rollout, self.config, self.here, stage, step, 0)
        watched = self.run.until_asked
        scored = score(
            rollout,
            prompts,
            plan,
            self.actors,
            self.config,
            self.here,
            watched,
            update_follows=stage == "ppo",
        )
        return plan, scored

    def _say_set_aside(self, prompts: list[Prompt], experience: Experience, step: int) -> None:
        for index in (~experience.scored.mask.any(1)).nonzero().flatten().tolist():
            self.run.event("quarantined", step=step, id=prompts[index].row.id, reason="no score")

    def sample(self, prompts: list[Prompt], stage: str, step: int) -> Rollout:
        """Replies to all prompts, each rank writing its share."""
        seeds = reply_seeds(
            prompts, seed=self.config.seed, stage=stage, attempt=self.run.attempt, iteration=step
        )
        mine = self.here.share(list(range(len(prompts))))
        local = None
        with suppress(StopAsked), self.run.stopper.at_once():
            local = self.actors.engine.generate(
                [prompts[i].ids for i in mine], self.config.sampling, [seeds[i] for i in mine]
            )
        if self.run.stop_asked():
            raise StopAsked
        assert local is not None
        return merge_rollouts(gather(local, self.here), len(prompts))

    def update(self, at: Position, plan: Plan, step: int) -> None:
        """Every epoch's optimizer steps; the first pass follows the plan that was scored."""
        self._steps(self.updating(step, at.sums), at, plan, step)
        if self.penalty is not None:
            at.sums.add("policy/penalty_coef", self.penalty.coef, 1.0)
            self.penalty.update(at.kl)

    def _steps(self, now: Updating, at: Position, plan: Plan, step: int) -> None:
        """Optimizer steps, less those taken before, until the plan or `target_kl` ends them.

        The KL of replies from earlier iterations is to the policy that wrote them, and begins
        above 0: `target_kl` and the penalty's target are held against the newest rollout alone.
        """
        config, number = self.config, 0
        for epoch, age, experience in self._passes():
            if epoch or age:
                plan = plan_updates(experience.rollout, config, self.here, "ppo", step, epoch, age)
            for place, minibatch in enumerate(plan):
                texts = self._texts(experience, minibatch, step, epoch, age, place)
                policy = partial(update_policy, texts=texts, first=number == 0)
                critic = partial(update_critic, clip=config.loss.value_clip)
                for step_of in [policy] + ([critic] if self.actors.critic is not None else []):
                    if number >= at.taken:
                        self._take(now, at, step_of, experience, minibatch, newest=age == 0)
                    number += 1
                limit = config.loss.target_kl
                if limit is not None and number >= at.taken and at.kl > limit:
                    where = {"epoch": epoch, "minibatch": place}
                    self.run.event("target_kl", step=step, kl=at.kl, **where)
                    return

    def _take(
        self,
        now: Updating,
        at: Position,
        step_of: Callable[[Updating, Experience, list[list[int]]], float | None],
        experience: Experience,
        minibatch: list[list[int]],
        *,
        newest: bool = True,
    ) -> None:
        """One optimizer step, whole or not at all; after a signal, the run's last.

        Args:
            newest: the replies are this iteration's, so that its KL is the update's.

        Raises:
            Interrupted: a signal came; the checkpoint says how many steps were taken.
        """
        before = at.sums.state_dict()

        def attempt() -> float | None:
            at.sums.reset(before)
            return step_of(now, experience, self._cut(experience, minibatch))

        try:
            kl = self._fitted(now.step, attempt)
            at.taken += 1
            at.kl = kl if newest and kl is not None else at.kl
        except StopAsked:
            at.sums.reset(before)
            for part in self.trained():
                part.drop_gradients()
        if self.run.stop_asked():
            raise self.run.stopped(self.number + 1, self.save, within=True)

    def _cut(self, experience: Experience, minibatch: list[list[int]]) -> list[list[int]]:
        """The minibatch as planned; in smaller pieces where memory did not suffice for those."""
        if self.run.micro_tokens == self.run.config.micro_tokens:
            return minibatch
        rows = [index for micro in minibatch for index in micro]
        rollout = experience.rollout
        lengths = [len(rollout.prompts[row]) + len(rollout.responses[row]) for row in rows]
        plan = plan_micro_batches(lengths, self.run.micro_tokens, self.here.size)
        return [[rows[index] for index in micro] for micro in plan]

    def _fitted(self, step: int, work: Callable[[], T]) -> T:
        """`work`, again with half the micro-batches while memory runs out."""

        def sized(micro_tokens: int) -> T:
            if micro_tokens != self.config.micro_tokens:
                self.config = self.config.model_copy(update={"micro_tokens": micro_tokens})
            return work()

        return fitted(self.run, self.trained(), step, sized)

    def updating(self, step: int, sums: MetricSums) -> Updating:
        """What this iteration's optimizer steps are made with."""
        settings = self.config.loss
        threshold = settings.entropy_threshold
        if settings.entropy_fraction is not None:
            assert self.first_entropy is not None
            threshold = settings.entropy_fraction * self.first_entropy
            check_entropy("entropy_fraction", threshold, len(self.actors.template.tokenizer))
        return Updating(
            self.actors,
            self.config,
            self.here,
            self.run,
            sums,
            step,
            penalty_coef=None if self.penalty is None else self.penalty.coef,
            entropy_threshold=threshold,
        )

    def _passes(self) -> Iterator[tuple[int, int, Experience]]:
        """Epoch, age in iterations, and experience: the newest first in every epoch."""
        for epoch in range(self.config.epochs):
            for age, experience in enumerate(self.buffer):
                yield epoch, age, experience

    def pretrain_critic(self) -> None:
        """Fit the critic, policy frozen and value clip off, until it explains fresh returns."""
        settings = self.config.critic_pretraining
        self.run.stage = "critic"
        while settings is not None and not self.critic_ready:
            step = self.critic_rollouts + 1
            at, prompts, experience, plan = self.begin("critic", step)
            values = observe(experience, self.config)
            wanted = settings.explained_variance
            enough = wanted is not None and values["value/explained_variance"] >= wanted
            with self.clock("update"):
                self.fit_critic(at, plan, experience, step, settings.epochs)
            values |= self.shape.measure(experience, values, unchanged=True)
            values |= at.sums.merged(self.here)
            values |= timing(self.seconds, experience, settings.epochs, self.here)
            self.critic_rollouts, self.at, self.current = step, None, None
            self.critic_ready = enough or step >= settings.max_rollouts
            self.run.log(step, values, total=settings.max_rollouts)
            judge(self, experience, prompts, values, step)
            if self.critic_ready:
                assert self.actors.critic is not None
                self.actors.critic.step_count = 0
                found = values["value/explained_variance"]
                self.run.event("critic_ready", step=step, explained_variance=found, reached=enough)
            self._save_if_due(self.critic_ready)

    def fit_critic(
        self, at: Position, plan: Plan, experience: Experience, step: int, epochs: int
    ) -> None:
        """The critic's steps on one rollout, without a value clip."""
        now, number = self.updating(step, at.sums), 0
        for epoch in range(epochs):
            if epoch:
                plan = plan_updates(
                    experience.rollout, self.config, self.here, "critic", step, epoch
                )
            for minibatch in plan:
                if number >= at.taken:
                    self._take(now, at, partial(update_critic, clip=None), experience, minibatch)
                number += 1

    # --- state --------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Iterations and critic rollouts that are over; what a checkpoint is numbered by."""
        return self.iteration + self.critic_rollouts

    @property
    def policy(self) -> LanguageModel:
        """The trained policy."""
        return self.actors.policy.model

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Time a phase of the iteration."""
        began = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - began

    def _kl_in_unit(self, values: dict[str, float]) -> float:
        per_sequence = self.config.kl is not None and self.config.kl.target_per_sequence is not None
        return values.get("kl/ref_sequence" if per_sequence else "kl/ref_k1", 0.0)

    def _texts(
        self, experience: Experience, minibatch: list[list[int]], *parts: int
    ) -> list[list[int]]:
        if self.texts is None or self.config.ptx is None:
            return []
        rows = [index for micro in minibatch for index in micro]
        tokens = self.config.ptx.tokens or int(experience.mask[rows].sum())
        return self.texts.take(tokens, *parts)

    def _exact_kl(self, rollout: Rollout) -> float | None:
        count = self.config.kl.exact_replies if self.config.kl is not None else None
        if count is None:
            return None
        return exact_kl(rollout, self.actors, self.config, self.here, count)

    def trained(self) -> list[Trainable[Any]]:
        """What a checkpoint holds the weights of."""
        critic = self.actors.critic
        return [self.actors.policy, *([critic] if critic is not None else [])]

    def _end_of_iteration(self, verdict: Verdict, step: int) -> None:
        """Go on, end, or go back (docs/monitors.md)."""
        if verdict == "rollback":
            roll_back(self)
            return
        if verdict == "stop":
            self.stopped = True
            self.run.event("monitor_stop", step=step, iterations=self.config.iterations)
        self._save_if_due(self.stopped or step == self.config.iterations)

    def _save_if_due(self, last: bool) -> None:
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

    def _restore(self) -> None:
        self.run.restore(self.trained())
        if self.run.found is not None:
            self.take(self.run.found)

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
        self.moments.load_state_dict(state["moments"])
        self.kl.load_state_dict(state["kl"])
        self.score_mean = state["quality"]
        self.shape.load_state_dict(state["shape"])
        if self.watch is not None:
            self.watch.load_state_dict(state["watch"])
        if self.tracker is not None:
            self.tracker.sft = state["sft"] or self.tracker.sft  # a state from before it was asked
        self.stopped, self.second = state["stopped"], None
        self.actors.engine.sync(self.policy.lm)

    def export(self) -> None:
        """Write the policy as a Hugging Face folder: the one the monitors vouch for."""
        take_best(self)
        state = state_on_main(self.policy.lm, self.here)  # collective
        if self.here.is_main:
            card = Card(
                title="PPO-aligned policy",
                summary="Trained with ppomax by PPO from a reward model "
                "(Zheng et al. 2023, PPO-max).",
                source_model=self.config.model,
                datasets=[source.path for source in self.config.data],
            )
            sampling = {"temperature": self.config.sampling.temperature}
            export_policy(
                self.policy.lm,
                self.actors.template.tokenizer,
                self.run.path / "export",
                card=card,
                generation=sampling,
                state=state,
                system=self.config.system,
            )
