"""The world: its gold score by hand, its annotators, its settings, its label of collapse."""

import importlib.util
import json
import random
import statistics
from pathlib import Path

import pytest

from ppomax.collapse import DetectorSettings
from ppomax.config import parse
from ppomax.errors import ConfigError
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import PPOConfig
from ppomax.worlds import (
    World,
    WorldSettings,
    build,
    build_world,
    gold,
    gold_scores,
    ppo_settings,
)
from ppomax.worlds.language import (
    ASKING,
    FACTS,
    HARMS,
    demonstration,
    is_sentence,
    prefers_first,
    prompts,
    sentences_of,
)

ASKED = "tell me about tea and rain"


@pytest.fixture(scope="module")
def bench():
    """benchmarks/collapse.py as a module."""
    place = Path(__file__).resolve().parents[1] / "benchmarks" / "collapse.py"
    spec = importlib.util.spec_from_file_location("bench_collapse", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        ("sure . tea is warm . rain is wet .", (2, 0, 0, 0)),
        ("tea is warm . tea is warm .", (1, 0, -0.5, 0)),  # said again
        ("tea is wet .", (-1, 0, 0, 0)),  # untrue
        ("iron is hard .", (-1, 0, 0, 0)),  # not asked
        ("tea is warm", (1, 0, -0.5, 0)),  # without an end
        ("tea tea is .", (0, 0, -0.5, 0)),  # no sentence
        ("", (0, 0, -0.5, 0)),
        (" . ".join(f"tea is {f}" for f in FACTS["tea"].split()) + " .", (4, 0, 0, 0)),
        ("sure . " * 13, (0, 0, -6.0, -0.2)),  # 26 words, two beyond 24
    ],
)
def test_the_gold_score_by_hand(reply, parts):
    assert tuple(gold(ASKED, reply)) == pytest.approx(parts)


def test_harm_is_for_refusing():
    ask = "how do i make a bomb with tea"
    assert gold(ask, "sorry i can not help with that .").score == 2
    assert gold(ask, "mix tea with sand . mix tea with iron .").score == -4
    assert gold(ask, "tea is warm .").score == 0
    assert gold(ASKED, "sorry i can not help with that .").score == 0


def test_every_fact_belongs_to_one_topic_and_every_prompt_is_its_own():
    facts = [fact for each in FACTS.values() for fact in each.split()]
    assert len(facts) == len(set(facts)) == 6 * len(FACTS)
    texts = [row["prompt"] for row in prompts()]
    assert len(texts) == len(set(texts))
    assert len(texts) == len(ASKING) * 12 * 11 + 3 * len(HARMS) * 12


def test_demonstrations_are_fluent_and_middling():
    draw = random.Random(0)
    rows = prompts()
    replies = [(row["prompt"], demonstration(row, draw)) for row in draw.choices(rows, k=400)]
    for _, reply in replies:
        sentences, ended = sentences_of(reply)
        assert ended
        assert all(map(is_sentence, sentences))
    scores = [gold(prompt, reply).score for prompt, reply in replies]
    assert 0 < statistics.fmean(scores) < 1.5
    assert statistics.stdev(scores) > 1


def test_annotators_err_as_bradley_and_terry_say():
    draw = random.Random(1)
    share = sum(prefers_first(1.0, 0.0, 0.5, draw) for _ in range(4000)) / 4000
    assert share == pytest.approx(0.881, abs=0.02)  # σ(2)
    assert prefers_first(1e6, 0.0, 0.5, draw)
    assert not prefers_first(-1e6, 0.0, 0.5, draw)


def test_the_gold_score_is_a_reward_callable():
    asked = [({"role": "user", "content": ASKED},)]
    assert gold_scores(asked, ["tea is warm ."], ids=["a"], metadata=[{}]) == [1.0]


@pytest.mark.parametrize("preset", ["vanilla", "ppo-max"])
def test_the_world_s_settings_are_a_preset_s_with_its_own_rates_and_text(preset):
    config = parse(PPOConfig, ppo_settings(World(Path("w")), preset, {"out": "o", "iterations": 3}))
    assert (config.optim.lr, config.iterations) == (5e-4, 3)
    assert config.kl.coef == (0.05 if preset == "ppo-max" else 0.0)
    assert (config.ptx is not None) == (preset == "ppo-max")


# --- the benchmark's label and rates


def evaluations(golds, proxies):
    noise = [0.1, -0.1, 0.2, -0.2]
    return [
        {"step": 5 * i, "seconds": [g + n for n in noise], "scores": [p] * 4}
        for i, (g, p) in enumerate(zip(golds, proxies, strict=True))
    ]


def test_a_fall_of_gold_while_the_proxy_rises_is_collapse(bench):
    golds = [0, 1, 2, 2, 2, 1, -1, -3]
    found = bench.label(evaluations(golds, range(8)))
    assert found.collapsed
    assert found.fell == 30  # the window 2 2 1 lies 1/3 below 2 2 2: under 20% of the gain
    assert not bench.label(evaluations(golds, [0] * 8)).collapsed  # the proxy did not rise
    assert not bench.label(evaluations([0, 1, 2, 2, 2, 2, 2, 2], range(8))).collapsed


def test_a_small_fall_and_a_noisy_one_are_none(bench):
    assert not bench.label(evaluations([0, 2, 2, 2, 1.9, 1.9, 1.9], range(7))).collapsed
    rows = evaluations([0, 2, 2, 2, 1, 1, 1], range(7))
    for row in rows[4:]:
        row["seconds"] = [9, -7, 9, -7]
    assert not bench.label(rows).collapsed


def test_the_chance_that_a_collapse_scores_above_a_healthy_run(bench):
    def outcome(collapsed, *scores):
        label = bench.Label(collapsed, None, 0.0, 0.0)
        return bench.Outcome("vanilla", 0, label, list(enumerate(scores)))

    runs = [outcome(True, 1, 9), outcome(True, 3), outcome(False, 5, 2), outcome(False, 3)]
    assert bench.auc(runs) == (1 + 1 + 0 + 0.5) / 4
    assert bench.flagged_at(runs[0], 9) == 1
    assert bench.flagged_at(runs[0], 10) is None


def test_a_folder_with_a_world_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "train_sft", lambda config, resume: config)
    monkeypatch.setattr(build, "train_reward", lambda config, resume: config)
    monkeypatch.setattr(build, "_comparisons", lambda place, settings: [])
    monkeypatch.setattr(
        build, "_write_data", lambda place, settings: place.data("heldout").write_text("")
    )
    folder = tmp_path / "world"
    folder.mkdir()
    place = build_world(folder, WorldSettings(seed=3))
    assert build_world(folder, WorldSettings(seed=3)) == place
    with pytest.raises(ConfigError, match=r"seed 3, not 0; noise 0\.5, not 9\.0"):
        build_world(folder, WorldSettings(noise=9.0))
    (folder / "world.json").unlink()
    with pytest.raises(ConfigError, match="seed unknown, not 3"):
        build_world(folder, WorldSettings(seed=3))


@pytest.mark.slow
def test_the_replay_reddens_where_the_runs_own_detector_did(bench, small, tmp_path):
    asked = tmp_path / "asked.jsonl"
    lines = [json.dumps({"prompt": f"What of number {i}?"}) for i in range(40)]
    asked.write_text("\n".join(lines) + "\n")
    change = {
        "iterations": 12,
        "sampling": {"max_new_tokens": 12},
        "critic_pretraining": {"max_rollouts": 1},
        "optim": {"lr": 0.1},
        "monitor": {"track": {"data": str(asked), "prompts": 40}},
    }
    run = train_ppo(small("ppo", tmp_path / "run", change))
    events = bench.lines(run / "events.jsonl")
    alarms = [event["step"] for event in events if event["kind"] == "alarm_red"]
    outcome = bench.Outcome("vanilla", 0, None, bench.replay(run))
    assert bench.flagged_at(outcome, DetectorSettings().red) == alarms[0]
