"""An OpenAI-compatible endpoint as a judge: several requests at once, patience, a cap on cost.

The key comes from the environment, goes into one header and is never written anywhere: error texts
are cleaned of it.
"""

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ppomax.errors import ConfigError, PpomaxError
from ppomax.eval.answers import Answer
from ppomax.eval.asking import Ask
from ppomax.eval.extras import need

KEYS = ("PPOMAX_JUDGE_KEY", "OPENAI_API_KEY")
"""Variables that may hold the key; the first that is set is taken."""
PATIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which the same request may do later."""
REFUSED = frozenset({400, 413, 422})
"""Answers to one question, as a rule: too long a context, a content filter."""
ALL_REFUSED = 5
"""First questions that are all refused before the request itself is taken for wrong (ours)."""
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
        """Count a request, with its true cost in the place of what was set aside; None: all."""
        worst = self.reserved.pop(ask.key)
        self.calls += 1
        self.cost += worst if spent is None else spent


class _Later(Exception):
    """The request failed in a way that may pass."""

    def __init__(self, problem: str, wait: float | None = None, *, charged: bool = False) -> None:
        super().__init__(problem)
        self.wait = wait
        self.charged = charged
        """Whether the endpoint may have written an answer that did not come to be read."""


class _Refused(Exception):
    """The endpoint does not take this question."""


@dataclass(slots=True)
class _Keeper:
    """Keeps answers; refusals only once another question was answered.

    Where every question is refused the request is wrong, and none of them is to be kept for good.
    """

    keep: Keep
    place: Endpoint
    answered: bool
    held: list[tuple[Ask, Answer, str]] = field(default_factory=list)

    def answer(self, ask: Ask, answer: Answer) -> None:
        """Keep an answer and the refusals before it."""
        self.answered = True
        self.keep(ask, answer)
        for refused, empty, _ in self.held:
            self.keep(refused, empty)
        self.held.clear()

    def refuse(self, ask: Ask, answer: Answer, problem: str) -> None:
        """Keep a refusal, or hold it back.

        Raises:
            ConfigError: the first questions were all refused.
        """
        if self.answered:
            self.keep(ask, answer)
            return
        self.held.append((ask, answer, problem))
        if len(self.held) >= ALL_REFUSED:
            self.stop()

    def stop(self) -> None:
        """Say so if nothing but refusals came.

        Raises:
            ConfigError: it is so.
        """
        if self.held:
            ask, _, problem = self.held[0]
            raise ConfigError(
                f"judge {self.place.name}: the first {len(self.held)} questions were all refused, "
                f"prompt {ask.pair.prompt_id} with {problem}"
            )


def ask_endpoint(
    asks: Sequence[Ask], place: Endpoint, earlier: Sequence[Answer], keep: Keep
) -> None:
    """Ask every question; each answer goes to `keep` before its place is taken by another.

    Args:
        earlier: answers this judge has given before; they count towards the caps.

    A question the endpoint refuses gets an empty answer, which counts as unparsed.

    Raises:
        ConfigError: the key or every question is refused, or a cap is reached.
        PpomaxError: no usable answer after all tries.
    """
    budget = Budget(sum(answer.attempts for answer in earlier))
    budget.cost = sum(_whole_cost(place, answer) for answer in earlier)
    keeper = _Keeper(keep, place, any(not answer.refused for answer in earlier))
    asyncio.run(_ask_all(iter(asks), place, budget, keeper))


def cost(place: Endpoint, tokens_in: int, tokens_out: int) -> float:
    """Of one request, in the unit of the prices."""
    return (place.prices[0] * tokens_in + place.prices[1] * tokens_out) / 1e6


def _whole_cost(place: Endpoint, answer: Answer) -> float:
    """Of an answer and of what was charged before it."""
    lost = cost(place, answer.tokens_in, place.max_tokens)
    return cost(place, answer.tokens_in, answer.tokens_out) + answer.lost * lost


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


async def _ask_all(asks: Iterator[Ask], place: Endpoint, budget: Budget, keeper: _Keeper) -> None:
    """Workers take questions until there are none or one of them fails.

    Requests under way when one fails are finished and kept: they are paid for.
    """
    httpx = need("httpx", f"the judge {place.name}")
    failures: list[PpomaxError] = []
    key = api_key()

    async def work(client: Any) -> None:  # noqa: ANN401 - httpx is imported late
        while not failures and (ask := next(asks, None)) is not None:
            try:
                await _ask_patiently(client, ask, place, budget, keeper)
            except PpomaxError as error:
                failures.append(error)

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=place.concurrency)
    async with httpx.AsyncClient(headers=headers, timeout=place.timeout, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(place.concurrency)))
    if failures:
        raise failures[0]
    keeper.stop()


async def _ask_patiently(
    client: Any,  # noqa: ANN401 - httpx is imported late
    ask: Ask,
    place: Endpoint,
    budget: Budget,
    keeper: _Keeper,
) -> None:
    lost = 0
    for attempt in range(place.retries + 1):
        budget.reserve(ask, place)
        try:
            answer = await _request(client, ask, place)
        except _Refused as error:
            budget.settle(ask, 0.0)
            keeper.refuse(ask, Answer("", 0, 0, attempt + 1, lost, refused=True), str(error))
            return
        except _Later as error:
            problem, wait = str(error), error.wait
            budget.settle(ask, None if error.charged else 0.0)
            lost += error.charged
        else:
            budget.settle(ask, cost(place, answer.tokens_in, answer.tokens_out))
            keeper.answer(ask, replace(answer, attempts=attempt + 1, lost=lost))
            return
        if attempt < place.retries:
            own = place.backoff * 2**attempt * random.uniform(0.5, 1)
            await asyncio.sleep(min(LONGEST_WAIT, own if wait is None else wait))
    raise PpomaxError(
        f"judge {place.name}: no usable answer on prompt {ask.pair.prompt_id} after "
        f"{place.retries + 1} tries, last: {problem}; "
        "the answers so far are kept: the same `ppomax eval`, or `ppomax resume` of the run that "
        "was to be judged, goes on from there"
    )


async def _request(client: Any, ask: Ask, place: Endpoint) -> Answer:  # noqa: ANN401
    """One request.

    Raises:
        _Later: it may do later.
        _Refused: this question will not.
        ConfigError: none will.
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
        raise _Later(f"no answer within {place.timeout:g} s", charged=True) from None
    except httpx.TransportError as error:
        sent = not isinstance(error, httpx.ConnectError)
        problem = f"{type(error).__name__} ({_clean(str(error))})"
        raise _Later(problem, charged=sent) from None
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
        problem = f"HTTP {found.status_code}: {text[:200]}"
        if found.status_code in REFUSED:
            raise _Refused(problem)
        raise ConfigError(f"judge {place.name}: {problem}")
    return _read(found, ask, place)


def _read(found: Any, ask: Ask, place: Endpoint) -> Answer:  # noqa: ANN401 - httpx is imported late
    """The answer in a response; an empty one where the model wrote no text.

    Tokens that are not told count as the most they can be.

    Raises:
        _Later: not the JSON of a chat completion (cut short, a page of a proxy, another service).
    """
    try:
        body = found.json()
        message = body["choices"][0]["message"]
        text = message["content"] or ""
        usage = body.get("usage") or {}
        tokens_in = _told(usage.get("prompt_tokens"), most_tokens(ask.text))
        tokens_out = _told(usage.get("completion_tokens"), place.max_tokens)
        return Answer(str(text), tokens_in, tokens_out)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise _Later("an answer that is no chat completion", charged=True) from None


def _told(count: object, most: int) -> int:
    return count if isinstance(count, int) and count >= 0 else most


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
