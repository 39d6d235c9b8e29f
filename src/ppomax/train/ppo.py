"""PPO-max (Zheng et al. 2023, §5.4): sample, score, estimate, update, observe."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ppomax.distributed import gather
from ppomax.errors import TrainingError
from ppomax.masked import masked_mean
from ppomax.rollout.engine import Rollout, merge_rollouts, synced
from ppomax.train.estimates import estimate
from ppomax.train.experience_batch import Experience, Plan, Scored, exact_kl, plan_updates, score
from ppomax.train.guard import without_non_finite
from ppomax.train.loop import opened
from ppomax.train.observe import observe, sample_rows, timing
from ppomax.train.position import Position
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_export import export
from ppomax.train.ppo_state import Iteration, PPOState
from ppomax.train.ppo_step import cut, take_step, texts_beside, updating
from ppomax.train.prompts import Prompt, reply_seeds
from ppomax.train.recovery import begin_watch, go_on, judge, learn_normal, track
from ppomax.train.stopping import StopAsked
from ppomax.train.update import kl_of_update, update_critic, update_policy

CHECKED_EVERY = 10
"""Iterations, the first among them, whose first forward is computed twice, for scoring and for the
update: `policy/first_ratio_error` is a check of both there, in the others of the rest."""


def train_ppo(config: PPOConfig, *, resume: bool = False) -> Path:
    """Run the stage; returns its run directory, with the policy in `export/`."""
    with opened("ppo", config, resume=resume) as run:
        ppo = PPOState(config, run)
        learn_normal(ppo)
        pretrain_critic(ppo)
        train(ppo)
        export(ppo)
        return run.finish()


def train(ppo: PPOState) -> None:
    """All PPO iterations from where the run stands."""
    ppo.run.stage = "ppo"
    begin_watch(ppo)
    while ppo.iteration < ppo.config.iterations and not ppo.stopped:
        now = begin(ppo, "ppo", ppo.iteration + 1)  # sample, score, estimate
        ppo.buffer = [now.experience, *ppo.buffer][: ppo.config.buffer_iterations]
        with ppo.clock("update"):
            update(ppo, now)
        values = measure(ppo, now, unchanged=now.step == 1)
        ppo.kl.update(_kl_in_unit(values, ppo.config), ppo.config.replies)
        ppo.iteration, ppo.at, ppo.current = now.step, None, None
        ppo.score_mean = values["reward/score_mean"]
        ppo.run.log(now.step, values, total=ppo.config.iterations)
        show_replies(ppo, now)
        go_on(ppo, judge(ppo, now, values), now.step)
    ppo.run.all_saved()


def pretrain_critic(ppo: PPOState) -> None:
    """Fit the critic, policy frozen and value clip off, until it explains fresh returns."""
    settings = ppo.config.critic_pretraining
    ppo.run.stage = "critic"
    while settings is not None and not ppo.critic_ready:
        now = begin(ppo, "critic", ppo.critic_rollouts + 1)
        with ppo.clock("update"):
            fit_critic(ppo, now, settings.epochs)
        values = measure(ppo, now, unchanged=True)
        found, wanted = values["value/explained_variance"], settings.explained_variance
        enough = wanted is not None and found >= wanted
        ppo.critic_rollouts, ppo.at, ppo.current = now.step, None, None
        ppo.critic_ready = enough or now.step >= settings.max_rollouts
        ppo.run.log(now.step, values, total=settings.max_rollouts)
        judge(ppo, now, values)
        if ppo.critic_ready:
            assert ppo.actors.critic is not None
            ppo.actors.critic.step_count = 0
            ppo.run.event(
                "critic_pretrained", step=now.step, explained_variance=found, reached=enough
            )
        ppo.save_if_due(ppo.critic_ready)


# --- sample, score, estimate ------------------------------------------------------------------


def begin(ppo: PPOState, stage: str, step: int) -> Iteration:
    """An update from its first step; from where it stood, if a checkpoint fell inside it.

    Raises:
        Interrupted: a signal came before anything of this iteration touched the state.
    """
    if ppo.at is not None and ppo.current is not None:
        prompts, experience = ppo.drawn(ppo.taken - ppo.config.rollout_size), ppo.current
        plan = plan_updates(experience.rollout, ppo.config, ppo.here, stage, step, 0)
        ppo.seconds = dict(ppo.at.seconds)
    else:
        try:
            prompts, experience, plan = collect(ppo, stage, step)
        except StopAsked:
            raise ppo.run.stopped(ppo.number, partial(ppo.save, due=False)) from None
        ppo.at, ppo.current = Position(stage, seconds=dict(ppo.seconds)), experience
    for index in (~experience.scored.mask.any(1)).nonzero().flatten().tolist():
        ppo.run.event("quarantined", step=step, id=prompts[index].row.id, reason="no score")
    return Iteration(step, prompts, experience, plan, ppo.at)


def collect(ppo: PPOState, stage: str, step: int) -> tuple[list[Prompt], Experience, Plan]:
    """Sample, score, estimate: one rollout's experience and the plan of its update."""
    prompts = ppo.drawn(ppo.taken)
    ppo.actors.trunks.forget()
    with ppo.clock("rollout"):
        rollout = sample(ppo, prompts, stage, step)
    with ppo.clock("score"):
        plan, scored = ppo.fitted(step, lambda: _scored(ppo, rollout, prompts, stage, step))
        exact = ppo.fitted(step, lambda: _exact_kl(ppo, rollout))
    if ppo.run.stop_asked():  # nothing of this iteration has touched the state yet
        raise StopAsked
    scored, defects = without_non_finite(scored)
    for index, defect in defects.items():
        ppo.run.event("non_finite", step=step, id=prompts[index].row.id, reason=defect)
    if not scored.mask.any():
        texts = [ppo.actors.template.decode(ids) for ids in rollout.responses]
        place = ppo.run.keep_batch(stage, step, texts)
        why = next(iter(defects.values()), "the reward gave None or nan")
        raise TrainingError(
            f"{ppo.run.path}: all {len(prompts)} replies of {stage} rollout {step} are set "
            f"aside ({why}); nothing is left to learn from. They are in {place}"
        )
    experience = estimate(rollout, scored, ppo.moments, ppo.kl, ppo.config)
    experience = replace(experience, exact_kl=exact)
    if not experience.mask.any():
        raise TrainingError(
            f"{ppo.run.path}: all {len(prompts)} replies of {stage} rollout {step} were cut "
            "at the length limit and advantage.missing_eos: drop leaves nothing to learn from; "
            "raise sampling.max_new_tokens"
        )
    if ppo.first_entropy is None:
        ppo.first_entropy = float(masked_mean(scored.entropy, scored.mask))
    ppo.taken += ppo.config.rollout_size
    return prompts, experience, plan


def sample(ppo: PPOState, prompts: list[Prompt], stage: str, step: int) -> Rollout:
    """Replies to all prompts, each rank writing its share."""
    config, run = ppo.config, ppo.run
    seeds = reply_seeds(prompts, seed=config.seed, stage=stage, attempt=run.attempt, iteration=step)
    mine = ppo.here.share(list(range(len(prompts))))
    local = None
    holding = synced(ppo.actors.engine, ppo.policy.lm)
    with holding as engine, suppress(StopAsked), run.stopper.at_once():
        local = engine.generate(
            [prompts[i].ids for i in mine], config.sampling, [seeds[i] for i in mine]
        )
    if run.stop_asked():
        raise StopAsked
    assert local is not None
    return merge_rollouts(gather(local, ppo.here), len(prompts))


def _scored(
    ppo: PPOState, rollout: Rollout, prompts: list[Prompt], stage: str, step: int
) -> tuple[Plan, Scored]:
    plan = plan_updates(rollout, ppo.config, ppo.here, stage, step, 0)
    watched = ppo.run.until_asked
    keeps = stage == "ppo" and step % CHECKED_EVERY != 1
    asked = (rollout, prompts, plan, ppo.actors, ppo.config, ppo.here, watched)
    return plan, score(*asked, update_follows=keeps)


def _exact_kl(ppo: PPOState, rollout: Rollout) -> float | None:
    count = ppo.config.kl.exact_replies if ppo.config.kl is not None else None
    return None if count is None else exact_kl(rollout, ppo.actors, ppo.config, ppo.here, count)


# --- update -----------------------------------------------------------------------------------


def update(ppo: PPOState, now: Iteration) -> None:
    """Every epoch's optimizer steps; the first pass follows the plan that was scored."""
    _policy_steps(ppo, now)
    if ppo.penalty is not None:
        now.at.sums.add("policy/penalty_coef", ppo.penalty.coef, 1.0)
        if ppo.penalty.target is not None:
            ppo.penalty.update(ppo.fitted(now.step, partial(_kl_of_update, ppo, now)))


def _kl_of_update(ppo: PPOState, now: Iteration) -> float:
    """How far the newest rollout's policy has been left, over all its replies."""
    every = [micro for minibatch in now.plan for micro in minibatch]
    context = updating(ppo, now.at, now.step)
    return kl_of_update(context, now.experience, cut(ppo, now.experience, every))


def _policy_steps(ppo: PPOState, now: Iteration) -> None:
    """Optimizer steps, less those taken before, until the plan or `target_kl` ends them.

    The KL of replies from earlier iterations is to the policy that wrote them, and begins
    above 0: `target_kl` is held against the newest rollout alone.
    """
    config, at, plan, number = ppo.config, now.at, now.plan, 0
    context = updating(ppo, at, now.step)
    for epoch, age, experience in _passes(ppo):
        if epoch or age:
            plan = plan_updates(experience.rollout, config, ppo.here, "ppo", now.step, epoch, age)
        for place, minibatch in enumerate(plan):
            texts = texts_beside(ppo, experience, minibatch, now.step, epoch, age, place)
            policy = partial(update_policy, texts=texts, first=number == 0)
            critic = partial(update_critic, clip=config.loss.value_clip)
            for step_of in [policy] + ([critic] if ppo.actors.critic is not None else []):
                if number >= at.taken:
                    take_step(ppo, context, at, step_of, experience, minibatch, newest=age == 0)
                number += 1
            limit = config.loss.target_kl
            if limit is not None and number >= at.taken and at.kl > limit:
                where = {"epoch": epoch, "minibatch": place}
                ppo.run.event("target_kl", step=now.step, kl=at.kl, **where)
                return


def _passes(ppo: PPOState) -> Iterator[tuple[int, int, Experience]]:
    """Epoch, age in iterations, and experience: the newest first in every epoch."""
    for epoch in range(ppo.config.epochs):
        for age, experience in enumerate(ppo.buffer):
            yield epoch, age, experience


def fit_critic(ppo: PPOState, now: Iteration, epochs: int) -> None:
    """The critic's steps on one rollout, without a value clip."""
    context, plan, number = updating(ppo, now.at, now.step), now.plan, 0
    for epoch in range(epochs):
        if epoch:
            plan = plan_updates(
                now.experience.rollout, ppo.config, ppo.here, "critic", now.step, epoch
            )
        for minibatch in plan:
            if number >= now.at.taken:
                step_of = partial(update_critic, clip=None)
                take_step(ppo, context, now.at, step_of, now.experience, minibatch)
            number += 1


# --- observe ----------------------------------------------------------------------------------


def measure(ppo: PPOState, now: Iteration, *, unchanged: bool) -> dict[str, float]:
    """The iteration's row of metrics (collective).

    Args:
        unchanged: the replies are still those of the policy the run started from.
    """
    values = observe(now.experience, ppo.config) | now.at.sums.merged(ppo.here)
    values |= ppo.shape.measure(now.experience, values, unchanged=unchanged)
    if now.at.stage == "ppo":
        values |= track(ppo, now.step)
    return values | timing(ppo.seconds, now.experience, now.at.tokens, ppo.here)


def show_replies(ppo: PPOState, now: Iteration) -> None:
    """A few replies in samples.jsonl, in the iterations that show some."""
    log = ppo.config.log
    if now.step % log.samples_every == 0 or now.step in (1, ppo.config.iterations):
        attempt = ppo.run.attempt
        rows = sample_rows(
            now.experience, now.prompts, ppo.actors, log.samples, step=now.step, attempt=attempt
        )
        ppo.run.samples(rows)


def _kl_in_unit(values: dict[str, float], config: PPOConfig) -> float:
    """The KL that an adaptive coefficient is steered by."""
    per_sequence = config.kl is not None and config.kl.target_per_sequence is not None
    return values.get("kl/ref_sequence" if per_sequence else "kl/ref_k1", 0.0)
