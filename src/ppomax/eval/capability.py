"""What a model knows before and after: multiple choice by log-likelihood, free answers by match.

Three readings of a multiple choice: `letter` (choices shown, the likeliest letter), `text` (choices
not shown, the likeliest text per UTF-8 byte, so that a long choice is at no disadvantage) and
`text_sum` (not divided). The prompt is plain text without chat template, as in the EleutherAI
harness; its `acc` is `text_sum`, its `acc_norm` divides by characters and not the space before
them, and so differs from `text` on a few questions in a hundred.
"""

import hashlib
import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ppomax.config import Settings
from ppomax.data.batching import derived_seed
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, world
from ppomax.errors import ConfigError
from ppomax.eval.generate import compute_dtype
from ppomax.eval.likelihood import Likelihoods
from ppomax.eval.local_judges import fingerprint
from ppomax.eval.questions import (
    Question,
    answer_text,
    context,
    load_questions,
    shots_for,
)
from ppomax.eval.statistics import paired_difference, sign_test_p, wilson_interval
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.rollout import EngineSettings, SamplingParams, build_engine
from ppomax.rundir import write_text

READINGS = ("letter", "text", "text_sum", "match")
FREE_TOKENS = 32
"""Longest free answer; it ends at the first line break."""
Say = Callable[[str], None]


class CapabilityConfig(Settings):
    """Questions that models are asked; the alignment tax is the difference (figure 12)."""

    data: list[str] = Field(min_length=1)
    """Files of questions: {question, choices, answer, subject?, lang?}, or free answers."""
    fewshot: list[str] = []
    """Files of examples, of the same form; taken by subject."""
    shots: int = Field(0, ge=0)
    """Examples before each question (paper, figure 12: few-shot; 5 is usual)."""
    limit: int | None = Field(None, ge=1)
    """At most this many questions of each file."""
    micro_tokens: int = Field(8192, ge=1)
    """Tokens per forward; cannot change results."""


def evaluate_capability(
    models: dict[str, str],
    config: CapabilityConfig,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    say: Say,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Accuracy of each model and its difference from the first; JSON-ready.

    Args:
        models: name to folder or hub id; the first is the baseline.
        keep: folder for each model's answers; asked the same again, it is not asked but read.

    Raises:
        DataError: questions that cannot be used, or do not fit a model's positions.
    """
    questions, examples = load_all(config)
    shots = [shots_for(question, examples, config.shots) for question in questions]
    right: dict[str, dict[str, list[bool | None]]] = {}
    for name, model in models.items():
        place = None if keep is None else keep / f"{_key(model, questions, shots, dtype)}.json"
        if place is not None and place.exists():
            say(f"{name}: answered before, kept")
            right[name] = json.loads(place.read_text(encoding="utf-8"))
            continue
        say(f"{name}: {len(questions)} questions")
        options = (config.micro_tokens, dtype, trust_remote_code)
        right[name] = answer_all(model, questions, shots, *options, say=partial(_told, say, name))
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps(right[name]) + "\n")
    return {
        "shots": config.shots,
        "data": config.data,
        "num_questions": len(questions),
        "baseline": next(iter(models)),
        "models": list(models),
        "groups": [_group(name, places, right) for name, places in _groups(questions, config.data)],
    }


def _key(
    model: str, questions: Sequence[Question], shots: Sequence[Sequence[Question]], dtype: str
) -> str:
    """What a model's answers hang on, as a hash."""
    asked = [
        [asdict(one) for one in (question, *examples)]
        for question, examples in zip(questions, shots, strict=True)
    ]
    said = json.dumps([fingerprint(model) or model, dtype, asked])
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def load_all(config: CapabilityConfig) -> tuple[list[Question], list[Question]]:
    """Questions and examples of all files.

    Raises:
        ConfigError: shots without examples, or examples without shots.
    """
    if (config.shots > 0) != bool(config.fewshot):
        raise ConfigError("capability: shots and fewshot go together; give both or neither")
    names = file_names(config.data)
    questions = [
        question
        for path, name in zip(config.data, names, strict=True)
        for question in load_questions(path, name, config.limit)
    ]
    examples = [row for path in config.fewshot for row in load_questions(path, "examples")]
    return questions, examples


def file_names(paths: Sequence[str]) -> list[str]:
    """What each file's group is called: the shortest end of its path that no other has."""
    parts = [(*Path(path).parent.parts, Path(path).name.partition(".")[0]) for path in paths]
    names = []
    for own in parts:
        ends = [own[-size:] for size in range(1, len(own) + 1)]
        alone = [end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1]
        names.append("-".join((alone or ends)[0]))
    return names


def answer_all(
    name: str,
    questions: Sequence[Question],
    shots: Sequence[Sequence[Question]],
    micro_tokens: int,
    dtype: str,
    trust_remote_code: bool,
    *,
    say: Say = lambda _: None,
) -> dict[str, list[bool | None]]:
    """Of each reading, whether each question was answered rightly; None: not read so."""
    template = ChatTemplate(load_tokenizer(name, trust_remote_code=trust_remote_code))
    lm = load_policy(name, dtype=compute_dtype(dtype), trust_remote_code=trust_remote_code)
    found: dict[str, list[bool | None]] = {r: [None] * len(questions) for r in READINGS}
    with world() as here:
        model = LanguageModel(lm).to(here.device)
        score = Likelihoods(model, template.tokenizer, micro_tokens, here, compute_dtype(dtype))
        choice = [i for i, question in enumerate(questions) if question.choices]
        for form in ("letter", "text"):
            rows = [(i, c) for i in choice for c in range(len(questions[i].choices))]
            before = {i: context(questions[i], shots[i], form) for i in choice}
            after = [answer_text(questions[i], form, c) for i, c in rows]
            where = [questions[i].where for i, _ in rows]
            told = _Tenths(say, f"read by the {form}")
            sums = score([before[i] for i, _ in rows], after, where, told)
            own: dict[int, list[int]] = {i: [] for i in choice}
            for place, (i, _) in enumerate(rows):
                own[i].append(place)
            for i, places in own.items():
                total = np.array([sums[place] for place in places])
                size = np.array([len(after[place].encode()) for place in places])
                right = questions[i].answer
                if form == "letter":
                    found["letter"][i] = bool(total.argmax() == right)
                else:
                    found["text"][i] = bool((total / size).argmax() == right)
                    found["text_sum"][i] = bool(total.argmax() == right)
        free = [i for i, question in enumerate(questions) if not question.choices]
        for i, text in zip(free, _write(lm, template, questions, shots, free, here), strict=True):
            wanted = {normalised(answer) for answer in questions[i].texts}
            found["match"][i] = normalised(text) in wanted
    return {reading: values for reading, values in found.items() if set(values) != {None}}


def _told(say: Say, name: str, text: str) -> None:
    say(f"{name}: {text}")


class _Tenths:
    """Says how far a long reading is, at every tenth of it."""

    def __init__(self, say: Say, what: str) -> None:
        self.say, self.what, self.said = say, what, 0

    def __call__(self, share: float) -> None:
        """Another share is done."""
        if int(10 * share) > self.said:
            self.said = int(10 * share)
            self.say(f"{self.what} {share:.0%}")


def _write(
    lm: Any,  # noqa: ANN401 - a transformers model
    template: ChatTemplate,
    questions: Sequence[Question],
    shots: Sequence[Sequence[Question]],
    places: Sequence[int],
    here: World,
) -> list[str]:
    """Greedy free answers, up to the first line break."""
    if not places:
        return []
    engine = build_engine(EngineSettings(), lm, template, here, torch.float32)
    texts = [context(questions[i], shots[i], "text") for i in places]
    ids = [list(template.tokenizer(text)["input_ids"]) for text in texts]
    params = SamplingParams(temperature=0, max_new_tokens=FREE_TOKENS, stop=["\n"])
    seeds = [derived_seed("capability", i) for i in places]
    rollout = engine.generate(ids, params, seeds)
    written = [template.decode(reply) for reply in rollout.responses]
    return [(text.strip().splitlines() or [""])[0] for text in written]


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016, SQuAD)."""
    marks = string.punctuation + "。，、！？：；“”‘’（）《》"
    bare = "".join(char for char in text.lower() if char not in marks)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _groups(questions: Sequence[Question], files: Sequence[str]) -> list[tuple[str, list[int]]]:
    """All questions, those of each file where there are several, and of each subject."""
    found: dict[str, list[int]] = {"all": list(range(len(questions)))}
    for place, question in enumerate(questions):
        name, _, subject = question.group.partition("/")
        if len(files) > 1:
            found.setdefault(name, []).append(place)
        if subject:
            found.setdefault(question.group, []).append(place)
    return list(found.items())


def _group(
    name: str, places: Sequence[int], right: dict[str, dict[str, list[bool | None]]]
) -> dict[str, Any]:
    """Accuracy of every model in one group, by reading, and the paired test with the first."""
    readings: dict[str, Any] = {}
    for reading in READINGS:
        columns = {
            model: [float(v) for v in (found[reading][i] for i in places) if v is not None]
            for model, found in right.items()
            if reading in found
        }
        base = next(iter(columns.values()), [])
        if base:
            readings[reading] = {model: _row(values, base) for model, values in columns.items()}
    return {"group": name, "n": len(places), "readings": readings}


def _row(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Accuracy with Wilson's interval; difference with its interval and McNemar's exact test."""
    found = paired_difference(values, base)
    gained = sum(v > b for v, b in zip(values, base, strict=True))
    lost = sum(v < b for v, b in zip(values, base, strict=True))
    return {
        "n": len(values),
        "accuracy": sum(values) / len(values),
        "ci95": list(wilson_interval(sum(values), len(values))),
        "difference": found.mean,
        "difference_ci95": list(found.interval) if found.interval else None,
        "gained": gained,
        "lost": lost,
        "mcnemar_p": sign_test_p(gained, lost),
    }


def lines_of(record: dict[str, Any]) -> list[str]:
    """A table for a terminal."""
    lines = []
    for group in record["groups"]:
        for reading, rows in group["readings"].items():
            for model, row in rows.items():
                low, high = (100 * edge for edge in row["ci95"])
                line = f"{group['group']:<40} {reading:<9} {model:<24} "
                line += f"{100 * row['accuracy']:5.1f}%  [{low:.1f}, {high:.1f}]  n {row['n']}"
                if model != record["baseline"]:
                    line += f"  {100 * row['difference']:+.1f} points, p = {row['mcnemar_p']:.3g}"
                lines.append(line)
    return lines
