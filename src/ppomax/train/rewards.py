"""Scores from a Python function: called with texts, watched by a clock, None sets a reply aside."""

import asyncio
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from ppomax.errors import ConfigError, TrainingError
from ppomax.types import Messages

Scorer = Callable[..., Any]


def load_callable(name: str, setting: str) -> Scorer:
    """The function behind `module:function`.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function or "reward")
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
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
    """One score per reply; nan where the function gave None.

    Raises:
        TrainingError: it failed on every try, or returned something else than one number per reply.
    """
    arguments = ([list(prompt) for prompt in prompts], responses)
    for attempt in range(retries + 1):
        try:
            found = _started(scorer, arguments, {"ids": ids, "metadata": metadata})
            return _checked(found.result(timeout), len(responses))
        except FutureTimeout:
            problem = f"no answer within {timeout:g} s"
        except TrainingError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises
            problem = f"{type(error).__name__}: {error}"
        if attempt == retries:
            raise TrainingError(
                f"reward callable failed {retries + 1} times, last: {problem}; the last checkpoint "
                "is good"
            )
    raise AssertionError("unreachable")


def _started(
    scorer: Scorer, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Future[object]:
    """The call's outcome, from a thread that does not keep the process alive if it hangs."""
    future: Future[object] = Future()

    def work() -> None:
        try:
            future.set_result(_run(scorer, arguments, keywords))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, as a pool would
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _run(scorer: Scorer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> object:
    result = scorer(*arguments, **keywords)
    if inspect.isawaitable(result):

        async def wait() -> object:
            return await result

        return asyncio.run(wait())
    return result


def _checked(scores: object, count: int) -> list[float]:
    if not isinstance(scores, Sequence) or len(scores) != count:
        size = len(scores) if isinstance(scores, Sequence) else type(scores).__name__
        raise TrainingError(f"reward callable: {count} scores wanted, found {size}")
    result = [math.nan if score is None else float(score) for score in scores]
    if any(math.isinf(score) for score in result):
        raise TrainingError(
            "reward callable: an infinite score; give a finite one, or None to set a reply aside"
        )
    return result
