"""Scores from Python functions: called with texts, watched by a clock, None sets a reply aside."""

import asyncio
import importlib
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from concurrent.futures import Future, wait
from typing import Any

import torch

from ppomax.errors import ConfigError, TrainingError
from ppomax.types import Messages

Scorer = Callable[..., Any]
LARGEST = torch.finfo(torch.float32).max
"""Scores are fp32 from here on."""


def load_callable(name: str, setting: str) -> Scorer:
    """The function behind `module:function`.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function or "reward")
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError, OSError) as error:
        raise ConfigError(
            f"setting {setting}: {name!r} cannot be imported ({error}); write module:function"
        ) from None
    if not callable(found):
        raise ConfigError(f"setting {setting}: {name!r} is not a function")
    scorer: Scorer = found
    return scorer


def call(
    scorer: Scorer,
    prompts: Sequence[Messages],
    responses: list[str],
    ids: list[str],
    metadata: list[dict[str, Any]],
    *,
    timeout: float,
    retries: int,
) -> list[float]:
    """One score per reply; nan where the function gave None (or nan).

    Raises:
        TrainingError: it failed on every try, did not end, or returned something else than one
            number per reply.
    """
    answer = _answer(
        "reward callable",
        scorer,
        ([list(prompt) for prompt in prompts], responses),
        {"ids": ids, "metadata": metadata},
        timeout=timeout,
        retries=retries,
    )
    return _numbers("reward callable", "scores", answer, len(responses))


def call_steps(
    scorer: Scorer,
    prompts: Sequence[Messages],
    steps: list[list[str]],
    ids: list[str],
    metadata: list[dict[str, Any]],
    *,
    timeout: float,
    retries: int,
) -> list[list[float]]:
    """One reward per step of each reply; all nan where the function gave None for the reply.

    Raises:
        TrainingError: as `call`.
    """
    answer = _answer(
        "process function",
        scorer,
        ([list(prompt) for prompt in prompts], steps),
        {"ids": ids, "metadata": metadata},
        timeout=timeout,
        retries=retries,
    )
    return [
        [math.nan] * len(texts)
        if rewards is None
        else _numbers("process function", f"step rewards of reply {place}", rewards, len(texts))
        for place, (rewards, texts) in enumerate(
            zip(_items("process function", "lists", answer, len(steps)), steps, strict=True)
        )
    ]


def _answer(
    name: str,
    scorer: Scorer,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    *,
    timeout: float,
    retries: int,
) -> object:
    """What the function returns in time, on the first try that does not fail.

    A late call is abandoned, for a thread cannot be stopped (a coroutine is cancelled). It is not
    called again before the late call has ended, so two never run side by side.
    """
    problem = ""
    for attempt in range(retries + 1):
        future = _started(scorer, arguments, keywords, timeout)
        wait([future], timeout)
        if future.done():
            error = future.exception()
            if error is None:
                return future.result()
            problem = f"{type(error).__name__}: {error}"
            frames = traceback.extract_tb(error.__traceback__)
            if frames:
                problem += f" ({frames[-1].filename}:{frames[-1].lineno})"
            continue
        problem = f"no answer within {timeout:g} s"
        if attempt < retries and not wait([future], timeout).done:
            raise TrainingError(
                f"{name}: {problem}, and still running {timeout:g} s later; it is abandoned, and "
                "not called again beside itself; raise ppo.reward.timeout; what checkpoints "
                "there are, are good"
            )
    raise TrainingError(
        f"{name} failed {retries + 1} times, last: {problem}; what checkpoints there are, are good"
    )


def _started(
    scorer: Scorer, arguments: tuple[Any, ...], keywords: dict[str, Any], timeout: float
) -> Future[object]:
    """The call's outcome, from a thread that does not keep the process alive if it hangs."""
    future: Future[object] = Future()

    def work() -> None:
        try:
            future.set_result(_run(scorer, arguments, keywords, timeout))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, as a pool would
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _run(
    scorer: Scorer, arguments: tuple[Any, ...], keywords: dict[str, Any], timeout: float
) -> object:
    result = scorer(*arguments, **keywords)
    if inspect.isawaitable(result):

        async def ended() -> object:
            return await asyncio.wait_for(result, timeout)

        return asyncio.run(ended())
    return result


def _items(name: str, what: str, answer: object, count: int) -> list[Any]:
    """A list, array, tensor or any other sequence of `count` things."""
    plain = getattr(answer, "tolist", None)  # numpy's, torch's and pandas' way out
    items: Any = plain() if plain is not None else answer
    unordered = isinstance(items, str | bytes | Mapping | Set) or not isinstance(items, Sized)
    if unordered or len(items) != count:
        size = type(answer).__name__ if unordered else len(items)
        raise TrainingError(f"{name}: {count} {what} wanted, found {size}")
    return list(items)


def _numbers(name: str, what: str, answer: object, count: int) -> list[float]:
    """One number each; nan for None."""
    numbers = []
    for item in _items(name, what, answer, count):
        try:
            number = math.nan if item is None else float(item)
        except (TypeError, ValueError, OverflowError) as error:
            raise TrainingError(f"{name}: one number each wanted for {what} ({error})") from None
        if abs(number) > LARGEST:
            raise TrainingError(
                f"{name}: an infinite score; give a finite one, or None to set a reply aside"
            )
        numbers.append(number)
    return numbers
