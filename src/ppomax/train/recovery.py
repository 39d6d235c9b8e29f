"""What a red level leads to: back to the last green checkpoint and on with more constraint."""

from collections.abc import Mapping

from ppomax import checkpoint
from ppomax.checkpoint import Checkpoint
from ppomax.distributed import barrier
from ppomax.errors import CheckpointError
from ppomax.train.observe import sample_rows
from ppomax.train.ppo_state import Iteration, PPOState
from ppomax.train.watching import NUM_SAMPLES, Verdict


def learn_normal(ppo: PPOState) -> None:
    """The SFT model's answers to the tracked prompts, which the detector learns; once a run.

    Before anything is trained, so that every checkpoint, the critic's too, has learned them.
    """
    watch, tracker = ppo.watch, ppo.tracker
    if watch is None or tracker is None or tracker.sft is not None:
        return
    found = ppo.fitted(0, lambda: tracker.answer(ppo.policy, ppo.config))
    tracker.measure(found)
    tracker.write(found, ppo.run, 0)
    for row in found.rows(ppo.config.replies):
        watch.detector.learn(row)


def begin_watch(ppo: PPOState) -> None:
    """Where a run may be rolled back, a state to go back to."""
    watch, monitor = ppo.watch, ppo.config.monitor
    wanted = monitor is not None and monitor.action == "rollback"
    if wanted and watch is not None and not watch.green:
        ppo.save()


def track(ppo: PPOState, step: int) -> dict[str, float]:
    """Metrics of the held-out prompts, in the iterations that answer them."""
    ppo.second = None
    ppo.seconds.pop("heldout", None)
    tracker = ppo.tracker
    if tracker is None or (step % tracker.settings.every and step != ppo.config.iterations):
        return {}
    with ppo.clock("heldout"):
        found = ppo.fitted(step, lambda: tracker.answer(ppo.policy, ppo.config))
    tracker.write(found, ppo.run, step)
    values = tracker.measure(found)
    ppo.second = values.get("heldout/second_mean")
    return values


def judge(ppo: PPOState, now: Iteration, values: Mapping[str, float]) -> Verdict:
    """What the monitors say of an iteration."""
    run = ppo.run
    if ppo.watch is None:
        return "go"
    rows = sample_rows(
        now.experience, now.prompts, ppo.actors, NUM_SAMPLES, step=now.step, attempt=run.attempt
    )
    return ppo.watch.judge(now.step, values, rows, unchanged=run.stage == "critic")


def go_on(ppo: PPOState, verdict: Verdict, step: int) -> None:
    """Go on, end, or go back (docs/monitors.md); save what is due.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    if verdict == "rollback":
        roll_back(ppo)
        return
    if verdict == "stop":
        ppo.stopped = True
        ppo.run.event("monitor_stop", step=step, iterations=ppo.config.iterations)
    ppo.save_if_due(ppo.stopped or step == ppo.config.iterations)


def roll_back(ppo: PPOState) -> None:
    """Restore the last green checkpoint as a new attempt, which enters the seeds of its replies.

    Rows of the abandoned stretch stay, its checkpoints go: a crash must not resume from them.
    """
    watch, run, settings = ppo.watch, ppo.run, ppo.config.monitor
    assert watch is not None
    assert settings is not None
    number, left = watch.green[-1], ppo.iteration
    found = read(ppo, number)
    for part in ppo.trained():
        part.restore(found)
    rollbacks = watch.rollbacks + 1
    ppo.take(found)
    watch.reset()
    watch.went_back(number)
    watch.rollbacks = rollbacks
    coef = float(ppo.kl.coef)
    if settings.kl_factor is not None:
        ppo.kl.coef = max(coef * settings.kl_factor, settings.kl_least)
    for part in ppo.trained():
        part.lr_factor *= settings.lr_factor or 1.0
    run.event(  # of the attempt that ends: a crash after the save must not cut it
        "rollback",
        step=left,
        to=ppo.iteration,
        checkpoint=number,
        kl_coef_before=coef,
        kl_coef=float(ppo.kl.coef),
        lr_factor=ppo.actors.policy.lr_factor,
        rollbacks=rollbacks,
        left=settings.max_rollbacks - rollbacks,
    )
    run.attempt += 1
    barrier(ppo.here)  # every rank has read what is replaced now
    if ppo.here.is_main:
        checkpoint.drop_after(run.path / "checkpoints", number)
    ppo.save()


def read(ppo: PPOState, number: int) -> Checkpoint:
    """A green checkpoint, verified.

    Raises:
        CheckpointError: it was removed or damaged.
    """
    ppo.run.written()
    path = checkpoint.path_of(ppo.run.path / "checkpoints", number)
    found = checkpoint.verify(path)
    if found is None:
        raise CheckpointError(f"{path}: the last green checkpoint is missing or damaged")
    return found
