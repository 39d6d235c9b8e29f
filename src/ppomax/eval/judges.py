"""Judges: what one is, the settings of each, and pairs in, verdicts out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ppomax.config import Settings, parse
from ppomax.errors import ConfigError
from ppomax.eval import endpoint, local_judges, people
from ppomax.eval.answers import Answer, Answers
from ppomax.eval.asking import ORDERS, Ask, make_ask, read_position, side_of
from ppomax.eval.outcomes import Judged, Side, question_of
from ppomax.eval.pairs import Pair
from ppomax.eval.rubrics import Rubrics

Kind = Literal["reward", "callable", "openai", "local", "file", "human"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ENDPOINT_ONLY: tuple[str, ...] = (
    "concurrency",
    "timeout",
    "retries",
    "backoff",
    "max_calls",
    "max_cost",
    "price_in",
    "price_out",
    "extra",
)
WRITING_ONLY: tuple[str, ...] = ("max_tokens", "temperature")


class JudgeConfig(Settings):
    """One judge; a recipe may write its `spec` alone."""

    spec: str
    """`reward:PATH` (the higher score wins), `openai:BASE_URL#MODEL` (any OpenAI-compatible
    endpoint; key from PPOMAX_JUDGE_KEY or OPENAI_API_KEY), `local:MODEL`,
    `callable:module:function`, `file:VERDICTS` (people's votes), `human` (writes the pairs for
    them)."""
    name: str = ""
    """As tables show it; the spec unless said."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer of `openai` and `local` judges (ours)."""
    temperature: float = Field(0.0, ge=0)
    """Of `openai` and `local` judges; 0 repeats best (ours)."""
    concurrency: int = Field(8, ge=1)
    """Requests under way at once (ours)."""
    timeout: float = Field(120.0, gt=0)
    """Seconds for one request (ours)."""
    retries: int = Field(6, ge=0)
    """Further tries after 429, 5xx, a time-out, a broken connection or an unreadable answer."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the first further try; doubled each time, at most 60, a random half of it off.
    A `Retry-After` of the endpoint is kept to."""
    max_calls: int | None = Field(None, ge=1)
    """Stop before more requests than this, failed ones included, and those of earlier runs on the
    same answers."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before this much is spent, likewise; needs the prices. A request whose answer did not
    come to be read counts as the dearest it could have been."""
    price_in: float | None = Field(None, ge=0)
    """Price of a million tokens sent, in the unit of `max_cost`."""
    price_out: float | None = Field(None, ge=0)
    """Price of a million tokens written."""
    extra: dict[str, Any] = {}
    """Further fields of the request (`reasoning_effort: low`); null takes one of ours out."""

    @model_validator(mode="before")
    @classmethod
    def _spec_alone(cls, value: Any) -> Any:  # noqa: ANN401 - what a recipe holds
        return {"spec": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "JudgeConfig":
        kind = self.kind
        _check_target(kind, self.target)
        fields = type(self).model_fields
        idle: tuple[str, ...] = () if kind == "openai" else ENDPOINT_ONLY
        idle += () if kind in ("openai", "local") else WRITING_ONLY
        for name in idle:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect on a {kind} judge; leave it out")
        money = (self.max_cost, self.price_in, self.price_out)
        if any(value is None for value in money) and any(value is not None for value in money):
            raise ValueError("max_cost, price_in and price_out go together; give all three or none")
        return self

    @property
    def kind(self) -> Kind:
        """What stands before the colon."""
        name = self.spec.partition(":")[0]
        for kind in KINDS:
            if kind == name:
                return kind
        raise ValueError(f"judge {self.spec!r}: begins with none of {', '.join(KINDS)}")

    @property
    def target(self) -> str:
        """What stands behind the colon."""
        return self.spec.partition(":")[2]

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or self.spec

    @property
    def asks(self) -> bool:
        """Whether it is asked in words, in both orders, and its answers are kept."""
        return self.kind in ("openai", "local", "callable")


def _check_target(kind: Kind, target: str) -> None:
    if kind == "human":
        if target:
            raise ValueError("human takes nothing behind it; `file:VERDICTS` reads the votes")
        return
    if not target:
        raise ValueError(f"{kind}: needs something behind the colon")
    if kind == "openai":
        url, _, model = target.rpartition("#")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not model:
            raise ValueError("write openai:BASE_URL#MODEL, as in openai:http://localhost:8000/v1#m")
        if parts.username or parts.password or parts.query:
            raise ValueError("no key in the URL: put it into PPOMAX_JUDGE_KEY")
    if kind == "callable" and not all(target.partition(":")):
        raise ValueError("write callable:module:function")


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What one judge found."""

    rows: list[Judged]
    raters: dict[str, dict[str, Side]]
    """Verdicts by rater and item, for agreement: the judge itself, or each annotator."""
    notes: dict[str, int]
    """Counted oddities: pairs without a vote, votes on other pairs, refused questions."""


def judge_pairs(
    pairs: Sequence[Pair],
    config: JudgeConfig,
    rubrics: Rubrics,
    answers: Answers,
    *,
    say: Callable[[str], None],
) -> Verdicts:
    """Every pair judged; answers already kept are not asked for again.

    Replies that are equal tie without a question.

    Raises:
        PpomaxError: an endpoint, model, function or file that does not do; see its module.
    """
    if config.kind == "file":
        return _votes(pairs, Path(config.target))
    notes: dict[str, int] = {}
    if config.kind == "reward":
        rows = local_judges.by_reward_model(pairs, config.target)
    else:
        asks = all_asks(pairs, config, rubrics)
        rows = _asked(pairs, asks, config, answers, say)
        refused = sum(answers.known[ask.key].refused for ask in asks)
        notes = {"refused by the endpoint": refused} if refused else {}
    return Verdicts(rows, {config.label: verdicts_by_item(rows)}, notes)


def verdicts_by_item(rows: Sequence[Judged]) -> dict[str, Side]:
    """Verdicts by pair and question."""
    return {f"{row.pair.pair} {row.question}": row.verdict for row in rows}


def all_asks(pairs: Sequence[Pair], config: JudgeConfig, rubrics: Rubrics) -> list[Ask]:
    """Both orders of every pair whose replies differ; none for judges that are not asked."""
    if not config.asks:
        return []
    judge = _identity(config)
    return [
        make_ask(pair, question_of(pair.kind), order, rubrics, judge)
        for pair in pairs
        if pair.a.response != pair.b.response
        for order in ORDERS
    ]


def open_asks(asks: Sequence[Ask], answers: Answers) -> list[Ask]:
    """Those without an answer, each once."""
    return list({ask.key: ask for ask in asks if ask.key not in answers.known}.values())


def _asked(
    pairs: Sequence[Pair],
    asks: Sequence[Ask],
    config: JudgeConfig,
    answers: Answers,
    say: Callable[[str], None],
) -> list[Judged]:
    wanted = open_asks(asks, answers)
    say(f"{config.label}: {len(wanted)} questions, {len(asks) - len(wanted)} answered before")
    keep = _Keeper(config.label, _identity(config), len(wanted), answers, say)
    if wanted:
        match config.kind:
            case "openai":
                used = answers.used(keep.judge)
                endpoint.ask_endpoint(wanted, _endpoint(config), used, keep)
            case "local":
                local_judges.ask_local(
                    wanted, config.target, config.max_tokens, config.temperature, keep
                )
            case _:
                local_judges.ask_callable(wanted, config.target, keep)
    sides: dict[str, dict[str, Side | None]] = {}
    for ask in asks:
        found = read_position(answers.known[ask.key].text, ask.mark)
        sides.setdefault(ask.pair.pair, {})[ask.order] = side_of(found, ask.order)
    equal: dict[str, Side | None] = {"straight": "tie", "turned": "tie"}
    rows = []
    for pair in pairs:
        both = sides.get(pair.pair, equal)
        asked = pair.pair in sides
        question = question_of(pair.kind)
        rows.append(Judged(pair, question, both["straight"], both["turned"], ordered=asked))
    return rows


class _Keeper:
    """Writes each answer down and says how far the judge is."""

    def __init__(
        self, label: str, judge: str, total: int, answers: Answers, say: Callable[[str], None]
    ) -> None:
        self.label, self.judge, self.total = label, judge, total
        self.answers, self.say, self.done = answers, say, 0

    def __call__(self, ask: Ask, answer: Answer) -> None:
        self.answers.add(ask.key, self.judge, answer)
        self.done += 1
        if self.done == self.total or self.done % max(1, self.total // 10) == 0:
            self.say(f"{self.label}: {self.done} of {self.total} answers")


def _votes(pairs: Sequence[Pair], path: Path) -> Verdicts:
    found = people.read_votes(pairs, path)
    return Verdicts(found.rows, found.raters, found.notes)


def _identity(config: JudgeConfig) -> str:
    """What an answer depends on besides its question."""
    parts: list[Any] = [config.spec, config.max_tokens, config.temperature, config.extra]
    if config.kind == "local":
        parts.append(local_judges.fingerprint(config.target))
    if config.kind == "callable":
        parts.append(local_judges.source_of(config.target))
    return json.dumps(parts, sort_keys=True, default=str)


def _endpoint(config: JudgeConfig) -> endpoint.Endpoint:
    url, _, model = config.target.rpartition("#")
    return endpoint.Endpoint(
        url=url.rstrip("/"),
        model=model,
        name=config.label,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
        backoff=config.backoff,
        max_calls=config.max_calls,
        max_cost=config.max_cost,
        prices=(config.price_in or 0.0, config.price_out or 0.0),
        extra=config.extra,
    )


def parse_judges(specs: Sequence[str], options: dict[str, Any]) -> list[JudgeConfig]:
    """Judges of a command line; an option goes to those it has an effect on.

    Raises:
        ConfigError: a spec that is none, or an option that no judge takes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    judges, used = [], set()
    for spec in specs:
        kind = spec.partition(":")[0]
        takes: tuple[str, ...] = ENDPOINT_ONLY + WRITING_ONLY if kind == "openai" else ()
        takes = WRITING_ONLY if kind == "local" else takes
        own = {name: value for name, value in given.items() if name in takes}
        used |= set(own)
        judges.append(parse(JudgeConfig, {"spec": spec} | own, f"judge {spec}"))
    idle = sorted(set(given) - used)
    if idle:
        option = "--" + idle[0].replace("_", "-")
        raise ConfigError(f"option {option}: no judge given takes it; leave it out")
    return judges
