"""What judges found of pairs, and the numbers of one comparison made from it.

A pair is shown in both orders; a verdict counts when both agree, else it is a tie. An answer that
could not be read is no agreement: it is counted as unparsed and makes a tie, never dropped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppomax.eval import winrate
from ppomax.eval.pairs import Pair, Question
from ppomax.eval.statistics import sign_test_p, wilson_interval

Side = Literal["a", "b", "tie"]
VALUE: dict[Side, float] = {"a": 0.0, "tie": 0.5, "b": 1.0}
"""Of a verdict, for the candidate `b` against the baseline `a`."""
HARMFUL = frozenset({"harmful", "harmless", "sensitive"})
"""Kinds of prompts whose question is harmlessness."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge's two readings of one pair; a judge that sees no order reads once."""

    pair: Pair
    question: Question
    straight: Side | None
    """With `a` shown first; None: the answer could not be read."""
    turned: Side | None
    """With `b` shown first."""
    ordered: bool = True
    """False: a score or a person's vote, where neither reply came first."""

    @property
    def verdict(self) -> Side:
        """What both orders agree on, else a tie."""
        agreed = self.straight if self.straight == self.turned else None
        return "tie" if agreed is None else agreed

    @property
    def value(self) -> float:
        """1 where the candidate won, 0 where the baseline did, ½ for a tie."""
        return VALUE[self.verdict]

    @property
    def cluster(self) -> str:
        """What its prompt says: rows on one prompt are not independent."""
        return repr([(turn["role"], turn["content"]) for turn in self.pair.messages])


def question_of(kind: str) -> Question:
    """The question a prompt of this kind is judged by."""
    return "harmless" if kind in HARMFUL else "helpful"


def summary(rows: Sequence[Judged], *, seed: int = 0) -> dict[str, Any]:
    """All numbers of one judge on one comparison, by kind and language too; JSON-ready."""
    questions = sorted({row.question for row in rows})
    asked = [
        (question, [row for row in rows if row.question == question]) for question in questions
    ]
    return {
        **counts(rows, seed=seed),
        "unparsed": sum((row.straight is None) + (row.turned is None) for row in rows),
        "readings": sum(2 if row.ordered else 1 for row in rows),
        "disagreeing_orders": sum(row.ordered and row.straight != row.turned for row in rows),
        "position": position(rows),
        "length": length(rows),
        "questions": [{"question": name, **counts(of, seed=seed)} for name, of in asked],
        "by": [{"group": name, **counts(of, seed=seed)} for name, of in groups(rows)],
    }


def counts(rows: Sequence[Judged], *, seed: int = 0) -> dict[str, Any]:
    """Win, tie, lose of the candidate; win rate; what difference could have been seen."""
    verdicts = [row.verdict for row in rows]
    win, tie, lose = (verdicts.count(side) for side in ("b", "tie", "a"))
    values, clusters = [row.value for row in rows], [row.cluster for row in rows]
    rate = winrate.win_rate(values, clusters)
    seen = winrate.detectable(rate)
    return {
        "n": len(rows),
        "num_prompts": rate.num_prompts,
        **{
            name: {"count": k, "share": k / len(rows), "ci95": list(wilson_interval(k, len(rows)))}
            for name, k in (("win", win), ("tie", tie), ("lose", lose))
        },
        "win_rate": rate.rate,
        "se": rate.standard_error,
        "ci95": list(rate.interval),
        "bootstrap95": list(winrate.cluster_bootstrap(values, clusters, seed=seed)),
        "sign_p": sign_test_p(win, lose),
        "detectable": seen.difference,
        "needed": seen.needed,
    }


def position(rows: Sequence[Judged]) -> dict[str, Any] | None:
    """How often the reply shown first is taken, over all readings that take one; None: no order."""
    first = [row.straight == "a" for row in rows if row.ordered and row.straight in ("a", "b")]
    first += [row.turned == "b" for row in rows if row.ordered and row.turned in ("a", "b")]
    return _share(sum(first), len(first))


def length(rows: Sequence[Judged]) -> dict[str, Any]:
    """How often the longer reply (in characters) wins, and the win rate with length held fixed.

    `flagged`: the length of the replies decides more than chance would, in both readings of the
    data (the share of longer winners leaves out 50%, and the fitted effect has p < 0.05).
    """
    longer = [(len(row.pair.b.response) - len(row.pair.a.response)) for row in rows]
    decided = [
        (row.verdict == "b") == (d > 0)
        for row, d in zip(rows, longer, strict=True)
        if d and row.verdict != "tie"
    ]
    share = _share(sum(decided), len(decided))
    fit = winrate.length_controlled(
        [row.value for row in rows], longer, [row.cluster for row in rows]
    )
    flagged = bool(fit and fit.length_p < winrate.LEVEL and share and not _holds(share, 0.5))
    return {
        "longer": share,
        "controlled": fit.rate if fit else None,
        "controlled_ci95": list(fit.interval) if fit else None,
        "effect": fit.length_effect if fit else None,
        "effect_p": fit.length_p if fit else None,
        "flagged": flagged,
    }


def groups(rows: Sequence[Judged]) -> list[tuple[str, list[Judged]]]:
    """Rows by kind and language together, where the prompts say."""
    found: dict[str, list[Judged]] = {}
    for row in rows:
        name = "/".join(part for part in (row.pair.kind, row.pair.lang) if part)
        if name:
            found.setdefault(name, []).append(row)
    return sorted(found.items())


def telling(columns: Iterable[Sequence[Judged]]) -> list[tuple[Pair, float, float]]:
    """Each pair with how one-sided and how divided the readings of all judges are.

    `one-sided` is the distance of their mean from ½, `divided` their variance; an unread answer
    counts as a tie.
    """
    readings: dict[str, list[float]] = {}
    pairs: dict[str, Pair] = {}
    for rows in columns:
        for row in rows:
            pairs[row.pair.pair] = row.pair
            for side in (row.straight, row.turned):
                readings.setdefault(row.pair.pair, []).append(VALUE[side or "tie"])
    result = []
    for name, values in readings.items():
        mean = sum(values) / len(values)
        divided = sum((value - mean) ** 2 for value in values) / len(values)
        result.append((pairs[name], abs(mean - 0.5), divided))
    return result


def _share(count: int, n: int) -> dict[str, Any] | None:
    if n == 0:
        return None
    return {"share": count / n, "n": n, "ci95": list(wilson_interval(count, n))}


def _holds(share: dict[str, Any], value: float) -> bool:
    low, high = share["ci95"]
    return bool(low <= value <= high)
