"""What a red level leads to: back to the last green checkpoint and on with more constraint."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ppomax import checkpoint
from ppomax.checkpoint import Checkpoint
from ppomax.distributed import barrier
from ppomax.errors import CheckpointError
from ppomax.train.experience_batch import Experience
from ppomax.train.observe import sample_rows
from ppomax.train.prompts import Prompt
from ppomax.train.watching import NUM_SAMPLES, Verdict

if TYPE_CHECKING:
    from ppomax.train.ppo import PPO


def begin_watch(trainer: "PPO") -> None:
    """The SFT model's answers to the tracked prompts, and a state that can be gone back to."""
    watch, tracker, monitor = trainer.watch, trainer.tracker, trainer.config.monitor
    if watch is None or monitor is None:
        return
    if tracker is not None and tracker.sft is None:
        found = tracker.answer(trainer.policy)
        tracker.measure(found)
        tracker.write(found, trainer.run, 0)
        for row in found.rows(trainer.config.replies):
            watch.detector.learn(row)
    if monitor.action == "rollback" and not watch.green:
        trainer.save()


def track(trainer: "PPO", step: int) -> dict[str, float]:
    """Metrics of the held-out prompts, in the iterations that answer them."""
    trainer.second = None
    trainer.seconds.pop("heldout", None)
    tracker = trainer.tracker
    if tracker is None or (step % tracker.settings.every and step != trainer.config.iterations):
        return {}
    with trainer.clock("heldout"):
        found = tracker.answer(trainer.policy)
    tracker.write(found, trainer.run, step)
    values = tracker.measure(found)
    trainer.second = values.get("heldout/second_mean")
    return values


def judge(
    trainer: "PPO",
    experience: Experience,
    prompts: list[Prompt],
    values: Mapping[str, float],
    step: int,
) -> Verdict:
    """What the monitors say of an iteration."""
    run = trainer.run
    if trainer.watch is None:
        return "go"
    rows = sample_rows(
        experience, prompts, trainer.actors, NUM_SAMPLES, step=step, attempt=run.attempt
    )
    return trainer.watch.judge(step, values, rows, unchanged=run.stage == "critic")


def roll_back(trainer: "PPO") -> None:
    """Restore the last green checkpoint as a new attempt, which enters the seeds of its replies.

    Rows of the abandoned stretch stay, its checkpoints go: a crash must not resume from them.
    """
    watch, run, settings = trainer.watch, trainer.run, trainer.config.monitor
    assert watch is not None
    assert settings is not None
    number, left = watch.green[-1], trainer.iteration
    found = read(trainer, number)
    for part in trainer.trained():
        part.restore(found)
    rollbacks = watch.rollbacks + 1
    trainer.take(found)
    watch.reset()
    watch.went_back(number)
    watch.rollbacks = rollbacks
    coef = float(trainer.kl.coef)
    if settings.kl_factor is not None:
        trainer.kl.coef = max(coef * settings.kl_factor, settings.kl_least)
    for part in trainer.trained():
        part.lr_factor *= settings.lr_factor or 1.0
    run.event(  # of the attempt that ends: a crash after the save must not cut it
        "rollback",
        step=left,
        to=trainer.iteration,
        checkpoint=number,
        kl_coef_before=coef,
        kl_coef=float(trainer.kl.coef),
        lr_factor=trainer.actors.policy.lr_factor,
        rollbacks=rollbacks,
        left=settings.max_rollbacks - rollbacks,
    )
    run.attempt += 1
    barrier(trainer.here)  # every rank has read what is replaced now
    if trainer.here.is_main:
        checkpoint.drop_after(run.path / "checkpoints", number)
    trainer.save()


def take_best(trainer: "PPO") -> None:
    """Put the policy that is to be exported in place, where it is not the present one.

    The best by a second scorer among the green checkpoints kept, or the last green one (`action:
    log` only says so); never by the score that PPO was trained on, which is what an over-optimised
    policy is best at.
    """
    watch = trainer.watch
    number = watch.exported() if watch is not None else None
    if watch is None or number == trainer.number:
        return
    monitor, note = trainer.config.monitor, None
    if number is None or number <= trainer.critic_rollouts:  # of those the policy is still SFT's
        note = "no green checkpoint of a trained policy was kept; the last state is exported"
    elif monitor is not None and monitor.action == "log" and not watch.seconds:
        note = f"the run did not end green; checkpoint {number} was the last that was"
    if note is not None or number is None:
        trainer.run.event("alarm_export", step=trainer.iteration, note=note)
        return
    why = "best by the second scorer" if watch.seconds else "last green one"
    trainer.actors.policy.restore(read(trainer, number))
    trainer.run.event("export", step=trainer.iteration, checkpoint=number, why=why)


def read(trainer: "PPO", number: int) -> Checkpoint:
    """A green checkpoint, verified.

    Raises:
        CheckpointError: it was removed or damaged.
    """
    trainer.run.written()
    path = checkpoint.path_of(trainer.run.path / "checkpoints", number)
    found = checkpoint.verify(path)
    if found is None:
        raise CheckpointError(f"{path}: the last green checkpoint is missing or damaged")
    return found
