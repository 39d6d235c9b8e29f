"""One optimizer step of a PPO update: whole or not at all, whatever signals or memory do."""

from collections.abc import Callable
from dataclasses import replace

from ppomax.data.batching import plan_micro_batches
from ppomax.train.actors import check_entropy
from ppomax.train.experience_batch import Experience
from ppomax.train.position import Position
from ppomax.train.ppo_state import PPOState
from ppomax.train.stopping import StopAsked
from ppomax.train.update import Updating

Step = Callable[[Updating, Experience, list[list[int]]], float | None]
"""`update_policy` or `update_critic` with its settings; returns the KL if it has one."""


def updating(ppo: PPOState, at: Position, step: int) -> Updating:
    """What every optimizer step of an iteration is made with."""
    settings = ppo.config.loss
    threshold = settings.entropy_threshold
    if settings.entropy_fraction is not None:
        assert ppo.first_entropy is not None
        threshold = settings.entropy_fraction * ppo.first_entropy
        check_entropy("entropy_fraction", threshold, len(ppo.actors.template.tokenizer))
    return Updating(
        ppo.actors,
        ppo.config,
        ppo.here,
        ppo.run,
        at.sums,
        step,
        penalty_coef=None if ppo.penalty is None else ppo.penalty.coef,
        entropy_threshold=threshold,
    )


def take_step(
    ppo: PPOState,
    context: Updating,
    at: Position,
    step_of: Step,
    experience: Experience,
    minibatch: list[list[int]],
    *,
    newest: bool = True,
) -> None:
    """One optimizer step; after a signal, the run's last.

    Args:
        newest: the replies are this iteration's, so that its KL is the update's.

    Raises:
        Interrupted: a signal came; the checkpoint says how many steps were taken.
    """
    before = at.sums.state_dict()

    def attempt() -> float | None:
        at.sums.reset(before)
        now = replace(context, config=ppo.config)  # with what memory left of micro_tokens
        return step_of(now, experience, cut(ppo, experience, minibatch))

    try:
        kl = ppo.fitted(context.step, attempt)
        at.taken += 1
        at.kl = kl if newest and kl is not None else at.kl
        if kl is not None or at.stage == "critic":
            lengths = experience.rollout.lengths
            at.tokens += sum(lengths[row] for micro in minibatch for row in micro)
    except StopAsked:
        at.sums.reset(before)
        for part in ppo.trained():
            part.drop_gradients()
    if ppo.run.stop_asked():
        raise ppo.run.stopped(ppo.number + 1, ppo.save, within=True)


def cut(ppo: PPOState, experience: Experience, minibatch: list[list[int]]) -> list[list[int]]:
    """The minibatch as planned; in smaller pieces where memory did not suffice for those."""
    if ppo.run.micro_tokens == ppo.run.config.micro_tokens:
        return minibatch
    rows = [index for micro in minibatch for index in micro]
    rollout = experience.rollout
    lengths = [len(rollout.prompts[row]) + len(rollout.responses[row]) for row in rows]
    plan = plan_micro_batches(lengths, ppo.run.micro_tokens, ppo.here.size)
    return [[rows[index] for index in micro] for micro in plan]


def texts_beside(
    ppo: PPOState, experience: Experience, minibatch: list[list[int]], *parts: int
) -> list[list[int]]:
    """Plain text of the language-modelling term beside a minibatch; none where that is off."""
    if ppo.texts is None or ppo.config.ptx is None:
        return []
    rows = [index for micro in minibatch for index in micro]
    tokens = ppo.config.ptx.tokens or int(experience.mask[rows].sum())
    return ppo.texts.take(tokens, *parts)
