"""An OpenAI-compatible endpoint as a judge: several requests at once, patience, a cap on cost.

The key comes from the environment, goes into one header and is never written anywhere: error texts
are cleaned of it.
"""

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ppomax.errors import ConfigError, PpomaxError
from ppomax.eval.answers import Answer
from ppomax.eval.asking import Ask
from ppomax.eval.extras import need

KEYS = ("PPOMAX_JUDGE_KEY", "OPENAI_API_KEY")
"""Variables that may hold the key; the first that is set is taken."""
PATIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which the same request may do later."""
LONGEST_WAIT = 60.0
Keep = Callable[[Ask, Answer], None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask and how hard; the fields are those of `judges.JudgeConfig`."""

    url: str
    model: str
    name: str
    max_tokens: int
    temperature: float
    concurrency: int
    timeout: float
    retries: int
    backoff: float
    max_calls: int | None
    max_cost: float | None
    prices: tuple[float, float]
    extra: dict[str, Any]


@dataclass(slots=True)
class Budget:
    """What was spent and what requests under way may still take."""

    calls: int = 0
    cost: float = 0.0
    reserved: dict[str, float] = field(default_factory=dict)

    def reserve(self, ask: Ask, place: Endpoint) -> None:
        """Set aside what a request may cost at most.

        Raises:
            ConfigError: that would pass a cap.
        """
        worst = cost(place, most_tokens(ask.text), place.max_tokens)
        if place.max_calls is not None and self.calls + len(self.reserved) >= place.max_calls:
            raise _capped(place, f"max_calls = {place.max_calls}")
        planned = self.cost + sum(self.reserved.values()) + worst
        if place.max_cost is not None and planned > place.max_cost:
            raise _capped(place, f"max_cost = {place.max_cost:g}")
        self.reserved[ask.key] = worst

    def settle(self, ask: Ask, spent: float | None) -> None:
        """Put the true cost in the place of what was set aside; None: nothing was answered."""
        self.reserved.pop(ask.key, None)
        if spent is not None:
            self.calls += 1
            self.cost += spent


class _Later(Exception):
    """The request failed in a way that may pass."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


def ask_endpoint(
    asks: Sequence[Ask], place: Endpoint, earlier: Sequence[Answer], keep: Keep
) -> None:
    """Ask every question; each answer goes to `keep` before its place is taken by another.

    Args:
        earlier: answers this judge has given before; they count towards the caps.

    Raises:
        ConfigError: the key or the request is refused, or a cap is reached.
        PpomaxError: no usable answer after all tries.
    """
    budget = Budget(len(earlier))
    budget.cost = sum(cost(place, answer.tokens_in, answer.tokens_out) for answer in earlier)
    asyncio.run(_ask_all(iter(asks), place, budget, keep))


def cost(place: Endpoint, tokens_in: int, tokens_out: int) -> float:
    """Of one request, in the unit of the prices."""
    return (place.prices[0] * tokens_in + place.prices[1] * tokens_out) / 1e6


def most_tokens(text: str) -> int:
    """More tokens than the text can well have: one per UTF-8 byte of two, and a margin."""
    return len(text.encode(errors="replace")) // 2 + 32


def api_key() -> str | None:
    """The key, from the environment; white space around it is none of it.

    Raises:
        ConfigError: a header cannot hold it.
    """
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"variable {name}: only printable ASCII can be sent as a key")
        if key:
            return key
    return None


async def _ask_all(asks: Iterator[Ask], place: Endpoint, budget: Budget, keep: Keep) -> None:
    """Workers take questions until there are none or one of them fails.

    Requests under way when one fails are finished and kept: they are paid for.
    """
    httpx = need("httpx", f"the judge {place.name}")
    failures: list[PpomaxError] = []
    key = api_key()

    async def work(client: Any) -> None:  # noqa: ANN401 - httpx is imported late
        while not failures and (ask := next(asks, None)) is not None:
            try:
                budget.reserve(ask, place)
                await _ask_patiently(client, ask, place, budget, keep)
            except PpomaxError as error:
                failures.append(error)

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=place.concurrency)
    async with httpx.AsyncClient(headers=headers, timeout=place.timeout, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(place.concurrency)))
    if failures:
        raise failures[0]


async def _ask_patiently(
    client: Any,  # noqa: ANN401 - httpx is imported late
    ask: Ask,
    place: Endpoint,
    budget: Budget,
    keep: Keep,
) -> None:
    for attempt in range(place.retries + 1):
        try:
            answer = await _request(client, ask, place, attempt + 1)
        except _Later as error:
            problem, wait = str(error), error.wait
        else:
            budget.settle(ask, cost(place, answer.tokens_in, answer.tokens_out))
            keep(ask, answer)
            return
        if attempt < place.retries:
            own = place.backoff * 2**attempt * random.uniform(0.5, 1)
            await asyncio.sleep(min(LONGEST_WAIT, own if wait is None else wait))
    budget.settle(ask, None)
    raise PpomaxError(
        f"judge {place.name}: no usable answer after {place.retries + 1} tries, last: {problem}; "
        "the answers so far are kept: the same command goes on from there"
    )


async def _request(client: Any, ask: Ask, place: Endpoint, attempt: int) -> Answer:  # noqa: ANN401
    """One request.

    Raises:
        _Later: it may do later.
        ConfigError: it will not.
    """
    httpx = need("httpx", f"the judge {place.name}")
    body: dict[str, Any] = {
        "model": place.model,
        "messages": [{"role": "user", "content": ask.text}],
        "temperature": place.temperature,
        "max_tokens": place.max_tokens,
    } | place.extra
    body = {name: value for name, value in body.items() if value is not None}
    # An endpoint that knows the header charges a repeated request once.
    headers = {"Idempotency-Key": ask.key}
    try:
        found = await client.post(f"{place.url}/chat/completions", json=body, headers=headers)
    except httpx.TimeoutException:
        raise _Later(f"no answer within {place.timeout:g} s") from None
    except httpx.TransportError as error:
        raise _Later(f"{type(error).__name__} ({_clean(str(error))})") from None
    except httpx.HTTPError as error:
        raise ConfigError(f"judge {place.name}: {_clean(str(error))}") from None
    if found.status_code in PATIENT:
        raise _Later(f"HTTP {found.status_code}", _retry_after(found.headers))
    if found.status_code in (401, 403):
        raise ConfigError(
            f"judge {place.name}: the endpoint refuses the key (HTTP {found.status_code}); put a "
            f"valid one into {KEYS[0]} or {KEYS[1]}" + ("" if api_key() else " (neither is set)")
        )
    if not found.is_success:
        text = _clean(" ".join(found.text.split()))
        raise ConfigError(f"judge {place.name}: HTTP {found.status_code}: {text[:200]}")
    return _read(found, ask, attempt)


def _read(found: Any, ask: Ask, attempt: int) -> Answer:  # noqa: ANN401 - httpx is imported late
    """The answer in a response; an empty one where the model wrote no text.

    Raises:
        _Later: not the JSON of a chat completion (cut short, a page of a proxy, another service).
    """
    try:
        body = found.json()
        message = body["choices"][0]["message"]
        text = message["content"] or ""
        usage = body.get("usage") or {}
        tokens_in = int(usage.get("prompt_tokens", most_tokens(ask.text)))
        tokens_out = int(usage.get("completion_tokens", most_tokens(text)))
        return Answer(str(text), tokens_in, tokens_out, attempt)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise _Later("an answer that is no chat completion") from None


def _retry_after(headers: Any) -> float | None:  # noqa: ANN401 - httpx is imported late
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def _clean(text: str) -> str:
    """The text without the key, should an endpoint repeat it."""
    key = api_key()
    return text.replace(key, "***") if key else text


def _capped(place: Endpoint, cap: str) -> ConfigError:
    return ConfigError(
        f"judge {place.name}: {cap} is reached; the answers so far are kept: raise the cap and run "
        "the same command again"
    )
