"""The declarations of metrics: complete, consistent, and what docs/metrics.md is made of."""

import re
from pathlib import Path

import pytest

from ppomax.monitors import DECLARED, as_markdown, check_keys

STAGES = {"sft", "reward", "critic", "ppo"}
CONTRACT = [
    "reward/score_mean",
    "reward/score_std",
    "reward/score_p05",
    "reward/score_p25",
    "reward/score_p50",
    "reward/score_p75",
    "reward/score_p95",
    "reward/score_skew",
    "reward/total_mean",
    "kl/ref_k1",
    "kl/ref_k3",
    "kl/ref_sequence",
    "kl/old_k3",
    "kl/first_old_k3",
    "policy/first_ratio_error",
    "policy/perplexity",
    "ref/perplexity",
    "policy/entropy",
    "policy/loss",
    "policy/clip_fraction",
    "policy/ratio_mean",
    "policy/ratio_max",
    "policy/grad_norm",
    "policy/lr",
    "value/loss",
    "value/clip_fraction",
    "value/mean",
    "value/explained_variance",
    "value/grad_norm",
    "return/mean",
    "advantage/mean",
    "advantage/std",
    "response/length_mean",
    "response/length_p95",
    "response/truncated_share",
    "response/distinct_2",
    "response/repetition_4",
    "ptx/loss",
    "engine/logprob_gap_mean",
    "engine/logprob_gap_max",
    "time/rollout",
    "time/score",
    "time/update",
    "throughput/rollout_tokens_per_s",
    "throughput/train_tokens_per_s",
    "memory/peak_gb",
]
SUPERVISED = {
    "reward": "reward/loss reward/pair_loss reward/lm_loss reward/accuracy eval/accuracy eval/loss "
    "batch/pairs batch/tokens",
    "sft": "sft/loss sft/perplexity eval/loss",
}


def of(stage):
    return {metric.key for metric in DECLARED if stage in metric.stages}


def test_every_key_users_rely_on_is_declared():
    assert set(CONTRACT) <= of("ppo")
    for stage, keys in SUPERVISED.items():
        assert set(keys.split()) <= of(stage)


def test_a_key_is_declared_once_with_unit_and_meaning():
    for stage in STAGES:
        keys = [metric.key for metric in DECLARED if stage in metric.stages]
        assert len(keys) == len(set(keys))
    for metric in DECLARED:
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", metric.key)
        assert metric.unit
        assert metric.meaning
        assert metric.stages
        assert set(metric.stages) <= STAGES


def test_an_undeclared_key_is_refused_and_named():
    check_keys("sft", {"sft/loss": 1.0})
    with pytest.raises(KeyError, match=r"stage sft: policy/loss, sft/los'$"):
        check_keys("sft", {"sft/los": 1.0, "policy/loss": 2.0, "sft/loss": 1.0})
    with pytest.raises(KeyError, match="stage critic: ptx/loss"):
        check_keys("critic", {"ptx/loss": 1.0})


def test_the_documents_table_has_one_line_per_key_and_no_broken_cell():
    lines = [line for line in as_markdown().splitlines() if line.startswith("| `")]
    assert len(lines) == len(DECLARED)
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 8


def test_the_document_is_the_declarations():
    document = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
    if not document.exists():
        pytest.skip("docs/metrics.md is not in this checkout")
    assert document.read_text(encoding="utf-8") == as_markdown()
