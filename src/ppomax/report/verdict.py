"""The verdict of a report: did it work, who says so, what to look at before believing it.

Pure functions of what was read; every result is ready for JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ppomax.report.judged import judged_verdict
from ppomax.report.read import (
    ALARMS,
    RunData,
    as_interval,
    as_number,
    event_name,
    listed,
    mapping,
    sides,
)
from ppomax.report.text import number, percent, signed

LENGTH_GROWTH = 1.5
"""A reply this many times the baseline's is worth a warning: half again as long (ours)."""
TRUNCATED_RISE = 0.1
"""So is this much more of the replies without an end (ours)."""
DISTINCT_FALL = 0.8
"""And distinct bigrams down to this share of the baseline's (ours)."""

FOLLOWS_LENGTH = 0.9
"""A reward model that prefers the longer answer in so large a share of pairs goes by it (ours)."""
_RULES = {
    "longer wins": "the longer answer wins",
    "shorter wins": "the shorter answer wins",
    "likelier wins": "the answer likelier under the language model wins",
    "likelier per token wins": "the answer likelier per token wins",
}


def verdict(stages: Sequence[RunData]) -> dict[str, Any]:
    """The outcome of a run: `headline`, `tone` (good, bad, unclear), `points`, `warnings`."""
    reports = [run.report for run in stages if run.report is not None]
    policies = [report for report in reports if report.get("kind") == "policy"]
    pairs = [report for report in reports if report.get("kind") == "preference"]
    points = [_trend(run) for run in stages]
    if policies:
        result = policy_verdict(policies[-1])
    elif pairs:
        result = preference_verdict(pairs[-1])
    else:
        headline = "No evaluation in this run: the curves below are from training data"
        result = {"headline": headline, "tone": "unclear", "points": [], "warnings": []}
    alarms = _alarms(stages)
    return {
        **result,
        "points": result["points"] + [point for point in points if point],
        "warnings": result["warnings"] + ([alarms] if alarms else []),
    }


def policy_verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """A policy against its baseline: a held-out scorer decides, the proxy only where alone.

    The proxy is the reward model the policy was trained on; gains on it alone can be gamed.
    """
    judged = judged_verdict(report)
    scorers = listed(report.get("scorers"))
    held_out = [scorer for scorer in scorers if scorer.get("role") != "proxy"]
    deciding = (held_out or scorers or [{}])[0]
    baseline, policy = map(_name, sides(report))
    sign, gamed = _sign(deciding), False
    same = f"No difference shown between {policy} and {baseline}"
    if sign is None:
        headline = f"{policy} against {baseline}: no score difference recorded"
    elif held_out:
        proxies = [_sign(scorer) for scorer in scorers if scorer.get("role") == "proxy"]
        gamed = sign < 1 and 1 in proxies
        better = f"{policy} is {'better' if sign > 0 else 'worse'} than {baseline}"
        headline = f"{better if sign else same}, judged by a held-out scorer"
    else:
        higher = f"{policy} scores {'higher' if sign > 0 else 'lower'} than {baseline}"
        headline = f"{higher if sign else same} on the reward model it was trained on"
    points = [
        f"Score difference {_difference(scorer)} on {_scorer_name(scorer)}" for scorer in scorers
    ]
    kl = as_number(report.get("kl_ref_k3"))
    if kl is not None:
        points.append(f"KL to the reference {number(kl)} nats per token")
    drift = as_number(report.get("log_ratio_k1"))
    if drift is not None:
        points.append(
            f"Log-ratio to the reference {signed(drift)} nats per token of these replies (no KL: "
            "they were not drawn from the plain policy)"
        )
    warnings = _drift(report)
    if gamed:
        warnings.insert(0, "The proxy says better and the held-out scorer does not: over-optimised")
    tone = {1: "good", -1: "bad"}.get(0 if sign is None else sign, "unclear")
    if judged is not None:  # judges read the replies: their word comes first
        said = [f"Scorers: {headline}"] if scorers else []
        return {
            "headline": judged["headline"],
            "tone": judged["tone"],
            "points": judged["points"] + said + points,
            "warnings": judged["warnings"] + warnings,
        }
    return {"headline": headline, "tone": tone, "points": points, "warnings": warnings}


def preference_verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """A reward model on preference pairs: against a coin, and against rules that need no model."""
    overall = mapping(result.get("accuracy"))
    share, interval = as_number(overall.get("accuracy")), as_interval(overall.get("ci95"))
    headline = (
        f"The reward model agrees with people on {percent(share)} of "
        f"{number(as_number(overall.get('n')))} pairs{_bracket(interval, percent)}"
    )
    baselines = mapping(result.get("baselines"))
    rates = {name: as_number(mapping(row).get("accuracy")) for name, row in baselines.items()}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    gains = {
        str(row.get("baseline")): row
        for row in listed(result.get("differences"))
        if row.get("column") == ""
    }
    points = [
        f"By a rule alone, {name}: {percent(rate)}"
        + (f"; the model is right more often by {_gain(gains[name])}" if name in gains else "")
        for name, rate in known.items()
    ]
    warnings = [
        f"Not shown to be better than the rule alone that {_RULES.get(name, name)}"
        for name, rate in known.items()
        if (_sign(gains[name]) != 1 if name in gains else share is not None and rate >= share)
    ]
    fed = [str(note) for note in result.get("warnings") or ()]
    warnings = [*_follows_length(result), *warnings, *fed]
    points += [str(note) for note in result.get("notes") or ()]
    tone = "unclear"
    if interval is not None:
        tone = "good" if interval[0] > 0.5 else "bad" if interval[1] < 0.5 else "unclear"
    if warnings and tone == "good":
        tone = "unclear"
    return {"headline": headline, "tone": tone, "points": points, "warnings": warnings}


def _follows_length(result: Mapping[str, Any]) -> list[str]:
    """Whether the model has learned to prefer the longer (or shorter) answer and little else."""
    length = mapping(result.get("length"))
    share = as_number(length.get("longer_preferred_by_model"))
    if share is None or 1 - FOLLOWS_LENGTH < share < FOLLOWS_LENGTH:
        return []
    rates = {str(row.get("longer")): row for row in listed(length.get("when"))}
    longer, shorter = (
        percent(as_number(mapping(rates.get(name)).get("accuracy")))
        for name in ("preferred answer", "other answer")
    )
    which, times = ("longer", share) if share > 0.5 else ("shorter", 1 - share)
    return [
        f"It follows length: it prefers the {which} answer in {percent(times)} of pairs; it is "
        f"right in {longer} of those where people prefer the longer answer and in {shorter} of "
        "those where they prefer the shorter one"
    ]


def _gain(row: Mapping[str, Any]) -> str:
    interval = as_interval(row.get("ci95"))
    return f"{percent(as_number(row.get('difference')))}{_bracket(interval, percent)}"


def _trend(run: RunData) -> str | None:
    """One sentence on the main metric of a training stage."""
    keys = run.series
    main = ("eval/accuracy", "reward/accuracy", "reward/score_mean", "eval/loss", "sft/loss")
    key = next((key for key in main if key in keys), None)
    if key is None:
        return None
    steps, values = keys[key]
    last = f"{number(values[-1])} by step {number(steps[-1])}"
    trend = last if len(values) == 1 else f"{number(values[0])} → {last}"
    return f"{_name(run.stage)}: {key} {trend}"


def _alarms(stages: Sequence[RunData]) -> str | None:
    names = [event_name(row) for run in stages for row in run.events]
    counts = {word: sum(word in name for name in names) for word in ALARMS}
    found = [f"{count} × {word}" for word, count in counts.items() if count]
    return f"Events to look at: {', '.join(found)}" if found else None


def _drift(report: Mapping[str, Any]) -> list[str]:
    """Marks of a gamed score: replies grown, cut off or repetitive beside the baseline's."""
    policies = mapping(report.get("policies"))
    both = [mapping(policies.get(side)) for side in sides(report)]
    length, cut, distinct = (
        _both(both, key) for key in ("length_mean", "truncated_share", "distinct_2")
    )
    found = []
    if length and 0 < length[0] * LENGTH_GROWTH <= length[1]:
        found.append(f"Replies grew from {number(length[0])} to {number(length[1])} tokens")
    if cut and cut[1] - cut[0] >= TRUNCATED_RISE:
        found.append(f"Replies without an end rose from {percent(cut[0])} to {percent(cut[1])}")
    if distinct and distinct[1] <= DISTINCT_FALL * distinct[0]:
        found.append(f"Distinct bigrams fell from {percent(distinct[0])} to {percent(distinct[1])}")
    return [f"{text}: read the samples" for text in found]


def _both(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    first, second = (as_number(row.get(key)) for row in rows)
    return None if first is None or second is None else (first, second)


def _sign(scorer: Mapping[str, Any]) -> int | None:
    """1 or -1 where the interval of the difference leaves out zero, else 0; None: unknown."""
    interval = as_interval(scorer.get("ci95"))
    if interval is None:
        return None if as_number(scorer.get("difference")) is None else 0
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0


def _difference(scorer: Mapping[str, Any]) -> str:
    interval = as_interval(scorer.get("ci95"))
    return f"{signed(as_number(scorer.get('difference')))}{_bracket(interval, signed)}"


def _bracket(interval: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    return "" if interval is None else f" (95% interval {form(interval[0])} to {form(interval[1])})"


def _scorer_name(scorer: Mapping[str, Any]) -> str:
    return f"{scorer.get('name', 'a scorer')} ({scorer.get('role', 'role not recorded')})"


def _name(value: str) -> str:
    return {"sft": "SFT", "ppo": "PPO", "reward": "Reward model"}.get(value, value)
