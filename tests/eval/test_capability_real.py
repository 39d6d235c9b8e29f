"""Capability of a real model on real questions, against plain transformers."""

import os
import runpy
from pathlib import Path

import pytest

from ppomax.errors import ModelError
from ppomax.eval import capability
from ppomax.eval.capability import CapabilityConfig
from ppomax.models.names import resolve

EACH = int(os.environ.get("PPOMAX_QUESTIONS_EACH", "4"))
"""Of each of two sets; 50 take five minutes on two cores."""
plain_right = runpy.run_path(str(Path(__file__).with_name("plain_choices.py")))["plain_right"]


@pytest.mark.slow
def test_real_questions_are_answered_as_plain_transformers_does(shared_data):
    try:
        folder = resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"smollm2-135m is not in the cache and cannot be fetched ({error})")
    paths = [str(shared_data / "mc" / f"{name}.jsonl") for name in ("openbookqa", "cmmlu")]
    questions, _ = capability.load_all(CapabilityConfig(data=paths, limit=EACH))
    none = [[] for _ in questions]
    found = capability.answer_all(folder, questions, none, 2048, "float32", False)
    expected = plain_right(folder, questions, none)
    readings = ("letter", "text", "text_sum")
    assert [[found[r][i] for r in readings] for i in range(len(questions))] == expected
