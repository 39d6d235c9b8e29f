"""`ppomax eval policy`: replies of several models, judged pair by pair, as one record."""

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppomax import rundir
from ppomax.data.batching import derived_seed
from ppomax.data.sources import SourceConfig
from ppomax.errors import ConfigError, DataError
from ppomax.eval import judges as judging
from ppomax.eval.agreement import agreement
from ppomax.eval.answers import open_answers, read_answers
from ppomax.eval.asking import Ask
from ppomax.eval.judges import JudgeConfig, Verdicts
from ppomax.eval.outcomes import Judged, Side, summary, telling
from ppomax.eval.pairs import Pair, write_pairs
from ppomax.eval.replies import (
    Replies,
    is_file_of_replies,
    load_unique_prompts,
    make_pairs,
    names_of,
    read_replies,
    write_replies,
)
from ppomax.eval.rubrics import Rubrics, load_rubrics
from ppomax.models.load import check_reward_model
from ppomax.rollout import SamplingParams
from ppomax.types import PromptRow

ANSWERS, PAIRS, JUDGED = "judge-answers.jsonl", "pairs.jsonl", "judged.jsonl"
"""Files in the output folder: what judges said, pairs for people, one verdict a line."""
SAMPLES = 6
"""Pairs of each sort that are shown side by side."""
Say = Callable[[str], None]


def compare_policies(
    models: Sequence[str],
    prompts: Sequence[str],
    judges: Sequence[JudgeConfig],
    out: Path,
    *,
    sampling: SamplingParams,
    seed: int,
    dtype: str,
    limit: int | None,
    rubrics: Path | None,
    dry_run: bool,
    say: Say,
) -> dict[str, Any] | None:
    """The first of `models` is the baseline, each other one is compared with it.

    Returns:
        The record of `judged_record` with prompts, replies and sampling; None for a dry run.

    Raises:
        PpomaxError: bad prompts, replies, models or judges.
    """
    if len(models) < 2:
        raise ConfigError("eval policy: name two or more models or files of replies")
    names = names_of(models)
    check_labels(judges)
    found = load_unique_prompts([SourceConfig(path=path) for path in prompts], limit=limit)
    texts = load_rubrics(rubrics)
    if dry_run:
        _say_calls(models, found.rows, judges, texts, out, say)
        return None
    for judge in judges:
        if judge.kind == "reward":
            check_reward_model("judge", judge.target)
    replies = []
    for index, (model, name) in enumerate(zip(models, names, strict=True)):
        place = out / "replies" / f"{index}.jsonl"
        if is_file_of_replies(model):
            replies.append(read_replies(model, found.rows, name))
        else:
            replies.append(
                write_replies(
                    model, found.rows, sampling, place, name, seed=seed, dtype=dtype, say=say
                )
            )
    pairs = {other.name: make_pairs(found.rows, replies[0], other) for other in replies[1:]}
    return {
        "kind": "policy",
        "baseline": names[0],
        "policy": names[1],
        "num_prompts": len(found.rows),
        "repeated_prompts": found.repeated,
        "replies": [_described(reply) for reply in replies],
        "sampling": sampling.model_dump(mode="json"),
        "seed": seed,
        **judged_record(pairs, judges, texts, out, seed=seed, say=say),
    }


def judged_record(
    pairs: Mapping[str, Sequence[Pair]],
    judges: Sequence[JudgeConfig],
    rubrics: Rubrics,
    out: Path,
    *,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """Judge the pairs of every candidate.

    Returns:
        `comparisons` (one per candidate and judge, see `outcomes.summary`), `agreement` (see
        `agreement.agreement`) and `judged_samples`.
    """
    every = [pair for of in pairs.values() for pair in of]
    columns: dict[str, Verdicts] = {}
    with open_answers(out / ANSWERS) as answers:
        for judge in judges:
            if judge.kind == "human":
                _hand_out(every, out / PAIRS, say)
            else:
                columns[judge.label] = judging.judge_pairs(every, judge, rubrics, answers, say=say)
    _write_judged(columns, out / JUDGED)
    raters = raters_of(columns)
    return {
        "comparisons": [
            _comparison(name, judge, columns[judge.label], seed=seed)
            for name in pairs
            for judge in judges
            if judge.label in columns
        ],
        "agreement": agreement(raters) if len(raters) > 1 else None,
        "judged_samples": samples(columns, seed=seed),
    }


def raters_of(columns: Mapping[str, Verdicts]) -> dict[str, dict[str, Side]]:
    """Verdicts of each judge and annotator; a name that several files hold has its judge's before.

    People of one name in two files may be two people.
    """
    names = Counter(name for found in columns.values() for name in found.raters)
    return {
        name if names[name] == 1 else f"{label}: {name}": sides
        for label, found in columns.items()
        for name, sides in found.raters.items()
    }


def _comparison(
    candidate: str, judge: JudgeConfig, verdicts: Verdicts, *, seed: int
) -> dict[str, Any]:
    rows = [row for row in verdicts.rows if row.pair.b.name == candidate]
    head: dict[str, Any] = {"candidate": candidate, "judge": judge.label, "judge_kind": judge.kind}
    head["notes"] = verdicts.notes
    if not rows:
        return head | {"n": 0}
    return head | {"baseline": rows[0].pair.a.name} | summary(rows, seed=seed)


def samples(columns: Mapping[str, Verdicts], *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Pairs to read: at random, those on which all readings agree most, and least."""
    rows = [found.rows for found in columns.values()]
    ranked = telling(rows)
    verdicts: dict[str, dict[str, str]] = {}
    for name, found in columns.items():
        for row in found.rows:
            many = len({other.question for other in found.rows}) > 1
            label = f"{name}, {row.question}" if many else name
            verdicts.setdefault(row.pair.pair, {})[label] = row.verdict
    drawn = list(ranked)
    random.Random(derived_seed(seed, "samples")).shuffle(drawn)
    sided = sorted(ranked, key=lambda row: (-row[1], row[2]))
    divided = sorted(ranked, key=lambda row: -row[2])
    chosen = {
        "random": drawn,
        "agreement": [row for row in sided if row[1] > 0],
        "disagreement": [row for row in divided if row[2] > 0],
    }
    return {
        sort: [_sample(row[0], verdicts[row[0].pair]) for row in picked[:SAMPLES]]
        for sort, picked in chosen.items()
    }


def _sample(pair: Pair, verdicts: dict[str, str]) -> dict[str, Any]:
    return {
        "id": pair.prompt_id,
        "prompt": list(pair.messages),
        "a": {"name": pair.a.name, "response": pair.a.response},
        "b": {"name": pair.b.name, "response": pair.b.response},
        "verdicts": verdicts,
    }


def check_labels(judges: Sequence[JudgeConfig]) -> None:
    """Each judge has a name of its own.

    Raises:
        ConfigError: no judge, or one twice.
    """
    labels = [judge.label for judge in judges]
    if not labels:
        raise ConfigError("eval policy: give at least one --judge")
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"judge {label}: given twice")


def _hand_out(pairs: Sequence[Pair], path: Path, say: Say) -> None:
    differing = {pair.pair: pair for pair in pairs if pair.a.response != pair.b.response}
    count = write_pairs(path, differing.values())
    say(f"human: {count} pairs in {path} ({len(pairs) - count} with equal replies left out)")
    say(f"human: run `ppomax annotate {path} --out VOTES.jsonl`, then --judge file:VOTES.jsonl")


def _write_judged(columns: Mapping[str, Verdicts], path: Path) -> None:
    lines = [json.dumps(_line(name, row)) for name, found in columns.items() for row in found.rows]
    rundir.write_text(path, "".join(line + "\n" for line in lines))


def _line(judge: str, row: Judged) -> dict[str, Any]:
    return {
        "pair": row.pair.pair,
        "prompt_id": row.pair.prompt_id,
        "a": row.pair.a.name,
        "b": row.pair.b.name,
        "judge": judge,
        "question": row.question,
        "straight": row.straight,
        "turned": row.turned,
        "verdict": row.verdict,
    }


def _described(reply: Replies) -> dict[str, Any]:
    lengths = [len(text) for text in reply.texts.values()]
    mean = sum(lengths) / max(1, len(lengths))
    return {"name": reply.name, "characters_mean": mean, **reply.origin, "notes": reply.notes}


def _say_calls(
    models: Sequence[str],
    rows: Sequence[PromptRow],
    judges: Sequence[JudgeConfig],
    rubrics: Rubrics,
    out: Path,
    say: Say,
) -> None:
    """Print the calls each judge would get; replies not yet written count as all different."""
    answers = read_answers(out / ANSWERS)
    for judge in judges:
        if not judge.asks:
            say(f"{judge.label}: 0 calls")
            continue
        wanted: dict[str, Ask] = {}
        unwritten = 0
        for index, other in enumerate(models[1:], start=1):
            read = [_there(name, rows, out, at) for at, name in ((0, models[0]), (index, other))]
            if read[0] is None or read[1] is None:
                unwritten += 2 * len(rows)
                continue
            asks = judging.all_asks(make_pairs(rows, read[0], read[1]), judge, rubrics)
            wanted |= {ask.key: ask for ask in asks}
        calls = unwritten + len(judging.open_asks(list(wanted.values()), answers))
        total = unwritten + len(wanted)
        most = "at most " if unwritten else ""
        say(f"{judge.label}: {most}{calls} calls ({total - calls} of {total} answered before)")


def _there(model: str, rows: Sequence[PromptRow], out: Path, index: int) -> Replies | None:
    """Replies that need no model; None where one would have to answer first."""
    if is_file_of_replies(model):
        return read_replies(model, rows, str(index))
    path = out / "replies" / f"{index}.jsonl"
    try:
        return read_replies(str(path), rows, str(index)) if path.is_file() else None
    except DataError:  # replies to other prompts: the run writes new ones
        return None


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The record's comparisons for a terminal."""
    return [line for row in record["comparisons"] for line in _lines(row)]


def _lines(row: Mapping[str, Any]) -> list[str]:
    head = f"{row['candidate']}, judged by {row['judge']}"
    if not row["n"]:
        return [f"{head}: no verdict"]
    low, high = (100 * edge for edge in row["ci95"])
    shares = " / ".join(f"{100 * row[name]['share']:.0f}%" for name in ("win", "tie", "lose"))
    lines = [
        f"{head}, against {row['baseline']}:",
        f"  win / tie / lose  {shares}  of {row['n']} pairs",
        f"  win rate          {100 * row['win_rate']:.1f}%  [{low:.1f}, {high:.1f}]  "
        f"sign test p = {row['sign_p']:.3g}",
        f"  could be seen     {100 * row['detectable']:.1f} points; 5 points need "
        f"{row['needed']['5']} prompts, 10 need {row['needed']['10']}",
    ]
    length = row["length"]
    if length["controlled"] is not None:
        flag = "; LENGTH DECIDES" if length["flagged"] else ""
        lines.append(f"  at equal length   {100 * length['controlled']:.1f}%{flag}")
    if row["position"]:
        lines.append(f"  first is taken    {100 * row['position']['share']:.0f}% of readings")
    if row["unparsed"]:
        lines.append(f"  unparsed          {row['unparsed']} of {row['readings']} readings")
    return lines + [f"  {name:<17} {count}" for name, count in row["notes"].items()]
