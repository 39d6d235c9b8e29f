"""The step loop of the two supervised stages: train, judge, log, save, stop when asked."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ppomax.train.loop import StageRun, Trainable
from ppomax.train.memory import fitted
from ppomax.train.stopping import StopAsked

Values = dict[str, float]


def run_steps(
    run: StageRun,
    part: Trainable[Any],
    state: dict[str, Any] | None,
    total: int,
    *,
    train: Callable[[int, int], Values],
    judge: Callable[[], Values],
    judge_every: int,
    quality: Callable[[Values], float | None],
) -> None:
    """Every optimizer step from where the run stands, each with its row, and checkpoints.

    A signal that meets a step drops it where it cannot be ended in time; one that meets an
    evaluation drops that, and the step's own numbers wait in the checkpoint for it.

    Args:
        state: of the checkpoint resumed from; None starts at the first step.
        train: the step of an index (from 0) with so many `micro_tokens`; returns its metrics.
        judge: metrics on held-out data, after the last step and every `judge_every`.
        quality: the number, higher is better, that `checkpoint.keep_best` goes by.
    """
    start: int = state["step"] if state else 0
    trained: Values | None = state.get("trained") if state else None

    def save(step: int, number: int, values: Values | None, rating: float | None = None) -> None:
        more = {"step": step, "trained": values, "quality": rating}
        run.save(number, [part], more, {run.name: step})

    for step in range(start, total):
        last = step + 1 == total
        try:
            if trained is None:
                trained = fitted(run, [part], step + 1, partial(train, step))
        except StopAsked:
            part.drop_gradients()
            raise run.stopped(step, partial(save, step, step, None)) from None
        try:
            found = judge() if last or (step + 1) % judge_every == 0 else {}
        except StopAsked:
            write = partial(save, step, step + 1, trained)
            raise run.stopped(step, write, within=True) from None
        run.log(step + 1, trained | found, total=total)
        trained = None
        stop = run.stop_asked()
        rating = quality(found) if found else None
        rating = rating if rating is not None and math.isfinite(rating) else None
        if stop and not last:
            raise run.stopped(step + 1, partial(save, step + 1, step + 1, None, rating))
        if last or (step + 1) % run.config.checkpoint.every == 0:
            save(step + 1, step + 1, None, rating)
    run.all_saved()
