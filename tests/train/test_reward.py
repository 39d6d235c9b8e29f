"""The reward stage against its formula, under any micro-batches, to a preference it can learn."""

import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
)

from ppomax.data.template import ChatTemplate, Encoded
from ppomax.distributed import World
from ppomax.errors import ConfigError, DataError, ModelError
from ppomax.models import fused, reading
from ppomax.models.kernels import kernels_for
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer
from ppomax.train import pair_forward, reward
from ppomax.train.pair_forward import forward_pairs, plan_pairs, settle_sharing
from ppomax.train.pairs import Pair, encode_pair, stack
from ppomax.train.probes import probe_messages
from ppomax.train.reward import RewardConfig, load_data, train_reward
from ppomax.train.settings import StageSettings
from ppomax.types import Message, PreferenceRow

TIMES = ("time", "throughput/", "memory/")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(run):
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in jsonl(run / "metrics.jsonl")
    ]


@pytest.fixture
def template(tiny):
    return ChatTemplate(load_tokenizer("tiny"))


def scores_of(model, pairs):
    """Scores of both answers of each pair, one text at a time; and the preferred ones' NLL."""
    found, total, count = [], 0.0, 0
    head = model.backbone.get_input_embeddings().weight  # tied
    for pair in pairs:
        scores = []
        for side in (pair.chosen, pair.rejected):
            output = model(torch.tensor([side.ids]))
            scores.append(output.values[0, -1])
        ids = torch.tensor(pair.chosen.ids)
        logits = model(ids[None]).hidden[:-1] @ head.T
        mask = torch.tensor(pair.chosen.mask[1:])
        total = total + F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
        count += int(mask.sum())
        found.append(torch.stack(scores))
    return torch.stack(found), total, count


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{}, {"lm_coef": 0.0}, {"margin": 0.5, "label_smoothing": 0.2, "ranking_coef": 3.0}],
    ids=str,
)
def test_the_first_step_is_equation_2(change, small, tmp_path, template):
    change = change | {"max_steps": 1, "micro_tokens": 120}
    config = small("reward", tmp_path / "run", change)
    found = rows(train_reward(config))[0]
    data = load_data(config, template)
    pairs = [data.train[index] for index in data.steps[0]]
    model = load_reward_model("tiny", seed=config.seed)
    scores, total, count = scores_of(model, pairs)
    z = scores[:, 0] - scores[:, 1] - config.margin
    smooth = config.label_smoothing
    ranking = (-(1 - smooth) * F.logsigmoid(z) - smooth * F.logsigmoid(-z)).mean()
    loss = config.ranking_coef * ranking + config.lm_coef * total / count
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert found["reward/pair_loss"] == pytest.approx(float(ranking.detach()), rel=1e-5)
    assert found["reward/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["reward/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert found["reward/accuracy"] == pytest.approx(
        float((scores[:, 0] > scores[:, 1]).float().mean())
    )
    assert found["batch/pairs"] == len(pairs)
    assert found["batch/tokens"] == sum(len(p.chosen.ids) + len(p.rejected.ids) for p in pairs)
    if config.lm_coef:
        assert found["reward/lm_loss"] == pytest.approx(float(total.detach() / count), rel=1e-5)
    else:
        assert "reward/lm_loss" not in found


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_19_micro_batches_from_one_pair_up_to_all_change_nothing(change, small, tmp_path):
    found = []
    for micro in (1, 150, 100_000):
        more = {"micro_tokens": micro, "max_steps": 3, "epochs": 3}
        run = train_reward(small("reward", tmp_path / str(micro), change | more))
        found.append((rows(run), load_file(run / "export" / "model.safetensors")))
    for other, weights in found[1:]:
        for one, two in zip(found[0][0], other, strict=True):
            numbers = {k: v for k, v in one.items() if k != "stage"}
            assert {k: two[k] for k in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-7)
        for name, value in weights.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=1e-5)


def test_pairs_of_a_ranked_list_share_one_prompts_weight(small, tmp_path, template):
    path = tmp_path / "ranked.jsonl"
    answers = ["Best of all.", "Good.", "Bad.", "Worst."]
    lines = [{"prompt": "Q?", "responses": answers, "ranks": [1, 2, 3, 4]}]
    lines += [{"prompt": f"R{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "heldout": 0.0, "batch_tokens": 10_000, "lm_coef": 0.0}
    config = small("reward", tmp_path / "run", change)
    found = rows(train_reward(config))[0]
    assert found["batch/pairs"] == 6 + 3
    pairs = load_data(config, template).train
    with torch.no_grad():
        scores, _, _ = scores_of(load_reward_model("tiny", seed=config.seed), pairs)
    z = (scores[:, 0] - scores[:, 1]).tolist()
    weights = [1 / 6 if pair.row.prompt[-1]["content"] == "Q?" else 1.0 for pair in pairs]
    expected = sum(w * math.log1p(math.exp(-x)) for w, x in zip(weights, z, strict=True)) / 4
    assert found["reward/pair_loss"] == pytest.approx(expected, rel=1e-5)
    right = sum(w for w, x in zip(weights, z, strict=True) if x > 0) / 4
    assert found["reward/accuracy"] == pytest.approx(right)


@pytest.mark.slow
def test_a_ranked_list_is_in_one_step_and_counts_once_in_the_imitation_too(
    small, tmp_path, template
):
    path = tmp_path / "ranked.jsonl"
    answers = ["The best of all.", "Good enough.", "Bad.", "Worst."]
    lines = [{"prompt": f"Q{i}?", "responses": answers, "ranks": [1, 2, 3, 4]} for i in range(9)]
    lines += [{"prompt": f"R{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "heldout": 0.0, "batch_tokens": 400, "max_steps": None}
    config = small("reward", tmp_path / "run", change)
    data = load_data(config, template)
    steps = [{data.train[i].row.where for i in step} for step in data.steps]
    assert len(steps) > 4
    assert sum(map(len, steps)) == len(lines) == len(set.union(*steps))
    one = small("reward", tmp_path / "one", change | {"batch_tokens": 99_999, "max_steps": 1})
    found = rows(train_reward(one))[0]
    with torch.no_grad():
        model = load_reward_model("tiny", seed=config.seed)
        each = [(pair.row.weight, *scores_of(model, [pair])[1:]) for pair in data.train]
    assert sum(weight for weight, _, _ in each) == pytest.approx(len(lines))
    total, tokens = (sum(row[0] * float(row[i]) for row in each) for i in (1, 2))
    assert found["reward/lm_loss"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.slow
def test_the_pairs_of_an_evaluation_come_from_every_source(small, tmp_path, template):
    paths = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.jsonl"
        lines = [
            {"prompt": f"Say {name} {i}.", "chosen": f"{name} {i}", "rejected": "no"}
            for i in range(40)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.append(str(path))
    change = {"data": paths, "heldout": 0.5}
    every, some = (
        load_data(small("reward", tmp_path / "run", change | {"eval_pairs": count}), template)
        for count in (None, 6)
    )
    assert len(some.heldout) == 6
    assert [pair.row.id for pair in some.train] == [pair.row.id for pair in every.train]
    told = [pair.row.where.split("/")[-1].split(".")[0] for pair in some.heldout]
    assert {told.count(name) for name in ("one", "two")} <= {2, 3, 4}
    places = [[p.row.where for p in every.heldout].index(p.row.where) for p in some.heldout]
    assert places == [i * len(every.heldout) // 6 for i in range(6)]


def test_a_pairs_strength_scales_the_margin(small, tmp_path):
    path = tmp_path / "strong.jsonl"
    base = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}
    losses = {}
    for strength in (None, 0.0, 1.0, 3.0):
        line = base if strength is None else base | {"strength": strength}
        path.write_text(json.dumps(line) + "\n")
        for margin in (0.0, 0.5):
            change = {"data": str(path), "heldout": 0.0, "lm_coef": 0.0, "margin": margin}
            config = small("reward", tmp_path / f"{strength}-{margin}", change | {"max_steps": 1})
            z = -math.log(math.expm1(rows(train_reward(config))[0]["reward/pair_loss"]))
            losses[strength, margin] = z  # softplus undone: the score difference less the margin
    difference = losses[None, 0.0]
    assert losses[3.0, 0.0] == pytest.approx(difference, rel=1e-4), "no margin, no matter"
    assert losses[None, 0.5] == pytest.approx(difference - 0.5, rel=1e-3)
    assert losses[0.0, 0.5] == pytest.approx(difference, rel=1e-3)
    assert losses[3.0, 0.5] == pytest.approx(difference - 1.5, rel=1e-3)


def test_both_answers_share_the_prompt_and_only_the_last_answer_is_a_target(template):
    prompt = (
        Message(role="user", content="Old?"),
        Message(role="assistant", content="Old answer."),
        Message(role="user", content="New?"),
    )
    pair = encode_pair(PreferenceRow("a", prompt, "Yes indeed.", "No."), template, 200)
    start = len(template.prompt(prompt))
    assert pair.chosen.ids[:start] == pair.rejected.ids[:start] == template.prompt(prompt)
    assert pair.chosen.ids[start:] == template.answer("Yes indeed.")
    assert pair.chosen.mask == [False] * start + [True] * (len(pair.chosen.ids) - start)
    short = encode_pair(PreferenceRow("a", prompt, "Yes indeed.", "No."), template, start)
    assert short is not None  # the older turn goes
    assert len(short.chosen.ids) < len(pair.chosen.ids)
    assert encode_pair(PreferenceRow("a", prompt[-1:], "Yes " * 99, "No."), template, 60) is None


def test_26_ids_of_prompt_and_response_are_ppos_and_sfts(template):
    from ppomax.train.sft import encode_dialogue
    from ppomax.types import SFTRow

    prompt = (Message(role="user", content="Why?"),)
    pair = encode_pair(PreferenceRow("a", prompt, "Because.", "No."), template, 200)
    talk = (*prompt, Message(role="assistant", content="Because."))
    dialogue = encode_dialogue(SFTRow("a", talk), template, 200)
    assert pair.chosen.ids == dialogue.ids
    assert pair.chosen.ids == template.prompt(prompt) + template.answer("Because.")


def test_stacked_pairs_are_chosen_first_with_targets_on_them_alone(template):
    here = World(0, 1, torch.device("cpu"))
    prompt = (Message(role="user", content="Why?"),)
    pairs = [
        encode_pair(PreferenceRow("a", prompt, c, r), template, 200)
        for c, r in (("Because it is.", "No."), ("So.", "Never ever in my life."))
    ]
    batch = stack(pairs, 3, here, imitate=True)
    assert batch.input_ids[1, : len(pairs[1].chosen.ids)].tolist() == pairs[1].chosen.ids
    assert batch.input_ids[2, : len(pairs[0].rejected.ids)].tolist() == pairs[0].rejected.ids
    counts = [pair.chosen.num_targets for pair in pairs]
    assert batch.targets.sum(1).tolist() == [*counts, 0, 0]
    assert stack(pairs, 3, here, imitate=False).num_targets == 0


@pytest.mark.parametrize("share", [False, True])
def test_scores_and_log_probs_of_several_pairs_are_those_of_each_text_alone(share, template):
    here = World(0, 1, torch.device("cpu"))
    said = (("Why?", "Because it is.", "No."), ("And how?", "So.", "Never ever in my life."))
    pairs = []
    for asked, chosen, rejected in said:
        row = PreferenceRow("a", (Message(role="user", content=asked),), chosen, rejected)
        pairs.append(encode_pair(row, template, 200))
    model = load_reward_model("tiny")
    with torch.no_grad():
        found = forward_pairs(model, pairs, 3, here, imitate=True, share_prompts=share)
        scores, _, _ = scores_of(model, pairs)
        logprobs = [-scores_of(model, [pair])[1] for pair in pairs]
    counts = [pair.chosen.num_targets for pair in pairs]
    torch.testing.assert_close(torch.stack(found[:2], 1), scores, rtol=1e-4, atol=1e-5)
    by_pair = torch.stack([part.sum() for part in found.logprobs.split(counts)])
    torch.testing.assert_close(by_pair, torch.stack(logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro", [1, 100, 150, 400])
def test_a_micro_batch_holds_both_answers_within_its_tokens(micro, small, tmp_path, template):
    config = small("reward", tmp_path, {"micro_tokens": micro})
    pairs = load_data(config, template).train
    pairs[0] = dataclasses.replace(
        pairs[0], rejected=pairs[0].rejected.__class__([5] * 60, [True] * 60)
    )
    here = World(0, 1, torch.device("cpu"))
    for batch in plan_pairs(pairs, config.micro_tokens, here, share_prompts=False):
        padded = stack([pairs[i] for i in batch], 3, here, imitate=True).input_ids.numel()
        assert padded <= micro or len(batch) == 1


def test_27_the_export_scores_in_plain_transformers_what_ours_scores_alone(
    small, tmp_path, template
):
    config = small("reward", tmp_path / "run", {"heldout": 0.5})
    run = train_reward(config)
    data = load_data(config, template)
    ours = load_reward_model(str(run / "export"), init_from_lm=False)
    plain = AutoModelForSequenceClassification.from_pretrained(run / "export")
    texts = [side.ids for pair in data.heldout for side in (pair.chosen, pair.rejected)]
    pad = template.tokenizer.pad_token_id
    longest = max(map(len, texts))
    batch = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in texts])
    with torch.no_grad():
        together = plain(batch, attention_mask=(batch != pad).long()).logits[:, 0]
        alone = [float(ours.scores(torch.tensor([i]), torch.tensor([len(i)]))) for i in texts]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    right = sum(c > r for c, r in zip(alone[::2], alone[1::2], strict=True))
    assert rows(run)[-1]["eval/accuracy"] == pytest.approx(right / len(data.heldout))
    expected = [
        -math.log(1 / (1 + math.exp(r - c))) for c, r in zip(alone[::2], alone[1::2], strict=True)
    ]
    assert rows(run)[-1]["eval/loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_the_card_holds_what_ppo_checks(small, small_reward, template):
    from pathlib import Path

    card = json.loads((Path(small_reward) / "reward_card.json").read_text())
    model = load_reward_model(small_reward, init_from_lm=False)
    assert [tuple(p["messages"]) for p in card["probes"]] == probe_messages()
    for probe in card["probes"]:
        ids = template.prompt(probe["messages"][:-1])
        ids = ids + template.answer(probe["messages"][-1]["content"])
        score = model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item()
        assert probe["score"] == pytest.approx(score, abs=1e-4)
    assert math.isfinite(card["score_mean"])
    assert card["score_std"] > 0
    assert set(card["accuracy"]) == {"all"}


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_the_card_takes_the_last_evaluations_scores_unless_merging_rounds_them(
    lora, small, tmp_path, monkeypatch
):
    from ppomax.train import reward, reward_card, scoring

    config = small("reward", tmp_path / "run", {"max_steps": 1, "lora": lora})
    scored = []

    def counted(model, pairs, *rest, **names):
        scored.append(len(pairs))
        return scoring.score_pairs(model, pairs, *rest, **names)

    monkeypatch.setattr(reward, "score_pairs", counted)
    monkeypatch.setattr(reward_card, "score_pairs", counted)
    run = train_reward(config)
    card = json.loads((run / "export" / "reward_card.json").read_text())
    held, trained = card["counts"]["heldout"], card["counts"]["train"]
    assert scored == [held, trained] + ([held] if lora else [])
    assert card["accuracy"]["all"] == pytest.approx(rows(run)[-1]["eval/accuracy"])


def test_the_cards_mean_and_std_are_of_pairs_from_all_over_the_data(small, tmp_path, monkeypatch):
    from ppomax.train import reward_card, scoring

    seen = []

    def noted(model, pairs, *rest, **names):
        seen.append([pair.row.where.rpartition(":")[2] for pair in pairs])
        return scoring.score_pairs(model, pairs, *rest, **names)

    monkeypatch.setattr(reward_card, "SAMPLE", 2)
    monkeypatch.setattr(reward_card, "score_pairs", noted)
    train_reward(small("reward", tmp_path / "run", {"max_steps": 1, "heldout": 0.0}))
    assert seen == [["1", "5"]]  # of eight


def test_an_architecture_that_cannot_be_exported_is_refused_before_training(tiny, small, tmp_path):
    config = GraniteConfig(
        vocab_size=len(load_tokenizer(tiny)),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = shutil.copytree(tiny, tmp_path / "granite")
    GraniteForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="granite: transformers has no sequence classification"):
        train_reward(small("reward", tmp_path / "run", {"model": str(folder)}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_answers_that_are_the_same_tokens_are_no_pair(tiny, small, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "lower")
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"normalizer": {"type": "Lowercase"}}))
    pairs = [{"prompt": f"Q{i}?", "chosen": "Tea is hot", "rejected": "no"} for i in range(5)]
    pairs.append({"prompt": "Q?", "chosen": "Tea", "rejected": "tea"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    change = {"model": str(folder), "data": str(path), "max_bad_rows": 0.05}
    with pytest.raises(DataError, match=r"identical-pair 1.*pairs\.jsonl:6: the answers are equal"):
        train_reward(small("reward", tmp_path / "run", change))


@pytest.mark.slow
def test_lora_trains_adapters_and_the_head(small, tmp_path):
    change = {"lora": {"rank": 2}, "dtype": "bfloat16", "max_steps": 2, "epochs": 2}
    run = train_reward(small("reward", tmp_path / "run", change))
    saved = load_file(max((run / "checkpoints").iterdir()) / "reward.safetensors")
    assert "score.weight" in saved
    assert all("lora_" in key or key == "score.weight" for key in saved)
    fresh = load_reward_model("tiny", seed=0).score.weight
    assert not torch.equal(saved["score.weight"], fresh)
    assert AutoModelForSequenceClassification.from_pretrained(run / "export").num_labels == 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"max_length": 9}, DataError, "max_length: no pair fits 9 tokens"),
        ({"max_length": 600}, ConfigError, "max_length: 600 is more than the 512 positions"),
        ({"label_smoothing": 0.5}, ConfigError, "label_smoothing"),
        ({"ranking_coef": 0.0}, ConfigError, "ranking_coef"),
    ],
)
def test_what_cannot_be_trained_is_one_line(change, error, text, small, tmp_path):
    with pytest.raises(error, match=text) as caught:
        train_reward(small("reward", tmp_path / "run", change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "done.json").exists()


CHANGES = {
    "heldout": {"heldout": 0.6},
    "lm_coef": {"lm_coef": 0.1},
    "ranking_coef": {"ranking_coef": 0.1},
    "margin": {"margin": 0.7},
    "label_smoothing": {"label_smoothing": 0.2},
    "epochs": {"epochs": 1},
    "max_steps": {"max_steps": 1},
    "batch_tokens": {"batch_tokens": 100},
    "min_pairs": {"min_pairs": 2, "batch_tokens": 100},
    "max_pairs": {"max_pairs": 2},
    "eval_every": {"eval_every": 1},
    "eval_pairs": {"eval_every": 1, "eval_pairs": 1, "heldout": 0.6},
    "centre_coef": {"centre_coef": 0.1},
    "ensemble": {"ensemble": 2},
    "early_stop": {"eval_every": 1, "early_stop": {"patience": 1}, "optim": {"lr": 0.5}},
}
ELSEWHERE = {"data", "optim", "lora", "strength", "licence", "share_prompts"}
"""Keys whose effect, or none, has a test of its own."""


@pytest.mark.slow
def test_13_every_key_of_its_own_changes_the_result(small, tmp_path):
    own = set(RewardConfig.model_fields) - set(StageSettings.model_fields) - ELSEWHERE
    assert own == set(CHANGES)
    base = {"max_steps": 3, "epochs": 2, "batch_tokens": 10_000, "eval_every": 20}
    base |= {"min_pairs": 1}
    plain = rows(train_reward(small("reward", tmp_path / "base", base)))
    found = {
        key: rows(train_reward(small("reward", tmp_path / key, base | change)))
        for key, change in CHANGES.items()
    }
    assert [key for key, other in found.items() if other == plain] == []
    every = base | CHANGES["eval_pairs"] | {"eval_pairs": None}
    assert found["min_pairs"] != found["batch_tokens"]
    assert found["eval_pairs"] != rows(train_reward(small("reward", tmp_path / "all", every)))


@pytest.mark.slow
def test_it_learns_an_obvious_preference(small, tmp_path):
    path = tmp_path / "pairs.jsonl"
    things = ["tea", "rain", "ducks", "moon", "songs", "bread", "salt", "trains", "hats", "snow"]
    lines = [
        {
            "prompt": f"Tell me of {a} and {b}.",
            "chosen": f"{a} please {b}." if i % 2 else f"please, {b} or {a}.",
            "rejected": f"{a} nope {b}." if i % 2 else f"nope, {b} or {a}.",
        }
        for i, (a, b) in enumerate((a, b) for a in things for b in things)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {
        "data": str(path),
        "heldout": 0.3,
        "batch_tokens": 1500,
        "max_steps": None,
        "epochs": 3,
        "lm_coef": 0.0,
        "eval_every": 1000,
        "checkpoint": {"every": 1000},
        "optim": {"lr": 3e-3, "grad_clip": 1.0},
    }
    found = rows(train_reward(small("reward", tmp_path / "run", change)))
    assert found[-1]["eval/accuracy"] > 0.9
    assert found[-1]["reward/pair_loss"] < 0.3


def test_a_reward_model_is_no_policy_and_a_policy_has_no_language_loss_left(small, small_reward):
    from ppomax.errors import ModelError

    with pytest.raises(ModelError, match="reward model"):
        load_policy(small_reward)


def test_strength_can_weigh_a_pair_instead_of_widening_its_margin(small, tmp_path, template):
    path = tmp_path / "pairs.jsonl"
    strengths = [2.0, 0.5, 0.0, None]
    lines = [
        {"prompt": f"Q{i}?", "chosen": "Yes. " * (i + 1), "rejected": "No.", "how_much": strength}
        for i, strength in enumerate(strengths)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(path), "strength": "how_much"}
    change = {"data": source, "heldout": 0.0, "batch_tokens": 10_000, "lm_coef": 0.0}
    change |= {"strength": "weight", "margin": 0.3, "max_steps": 1}
    config = small("reward", tmp_path / "run", change)
    found = rows(train_reward(config))[0]
    pairs = load_data(config, template).train
    with torch.no_grad():
        scores, _, _ = scores_of(load_reward_model("tiny", seed=config.seed), pairs)
    z = (scores[:, 0] - scores[:, 1] - 0.3).tolist()
    weights = [2.0, 0.5, 0.0, 1.0]
    by_id = dict(zip([f"Q{i}?" for i in range(4)], weights, strict=True))
    own = [by_id[pair.row.prompt[0]["content"]] for pair in pairs]
    expected = sum(w * math.log1p(math.exp(-x)) for w, x in zip(own, z, strict=True)) / 3.5
    assert found["reward/pair_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match=r"reward\.strength: no pair has a strength"):
        train_reward(small("reward", tmp_path / "b", change | {"data": str(path)}))


def test_the_centring_term_is_the_squared_sum_of_a_pairs_scores(small, tmp_path, template):
    change = {"max_steps": 1, "lm_coef": 0.0, "centre_coef": 0.25, "micro_tokens": 90}
    config = small("reward", tmp_path / "run", change)
    found = rows(train_reward(config))[0]
    data = load_data(config, template)
    pairs = [data.train[index] for index in data.steps[0]]
    with torch.no_grad():
        scores, _, _ = scores_of(load_reward_model("tiny", seed=config.seed), pairs)
    expected = float(scores.sum(1).square().mean())
    assert found["reward/centre_loss"] == pytest.approx(expected, rel=1e-5)
    total = found["reward/pair_loss"] + 0.25 * found["reward/centre_loss"]
    assert found["reward/loss"] == pytest.approx(total, rel=1e-5)


def test_a_score_that_is_no_number_stops_with_its_pair(small, tmp_path, monkeypatch):
    from ppomax.errors import TrainingError

    plain = reward.forward_pairs

    def broken(model, pairs, *rest, **options):
        output = plain(model, pairs, *rest, **options)
        lost = [math.nan if "moon" in pair.row.chosen else 0.0 for pair in pairs]
        return output._replace(rejected=output.rejected + torch.tensor(lost))

    monkeypatch.setattr(reward, "forward_pairs", broken)
    change = {"heldout": 0.0, "batch_tokens": 10_000, "micro_tokens": 120}
    with pytest.raises(
        TrainingError, match=r"score in step 1 is not finite, pair .*pairs\.jsonl:4"
    ):
        train_reward(small("reward", tmp_path / "run", change))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"lora": {"rank": 2}}, {"lm_coef": 0.0}], ids=str)
def test_a_shared_prompt_gives_the_same_loss_norm_and_weights(change, small, tmp_path):
    found, cards = [], []
    for share in (False, True):
        more = {"share_prompts": share, "micro_tokens": 130, "max_steps": 3, "epochs": 3}
        run = train_reward(small("reward", tmp_path / str(share), change | more))
        found.append((rows(run), load_file(run / "export" / "model.safetensors")))
        cards.append(json.loads((run / "export" / "reward_card.json").read_text()))
    for key in ("accuracy", "length_correlation"):
        assert cards[0][key]
        assert cards[1][key] == pytest.approx(cards[0][key], rel=1e-3)
    for one, two in zip(found[0][0], found[1][0], strict=True):
        numbers = {k: v for k, v in one.items() if k != "stage"}
        assert {k: two[k] for k in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-7)
    for name, value in found[1][1].items():
        torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=1e-5)


def test_prompts_are_shared_where_it_pays_and_never_where_the_model_cannot(
    small, tmp_path, template, monkeypatch
):

    def pairs(prompt, answer):
        row = PreferenceRow("a", (Message(role="user", content=prompt),), answer, answer + "!")
        return [[encode_pair(row, template, 500)]]

    here = World(0, 1, torch.device("cpu"))
    model = load_reward_model("tiny")
    long, short = pairs("Why is it so? " * 9, "So."), pairs("Why?", "Because it is so. " * 9)
    if kernels_for(torch.float32) is not None:  # it reads any texts' distinct prefixes
        assert not settle_sharing(None, model, long, 10, 3, here)
    for module in (fused, reading):
        monkeypatch.setattr(module, "kernels_for", lambda dtype: None)
    assert settle_sharing(None, model, long, 10, 3, here)
    assert not settle_sharing(None, model, short, 10, 3, here)
    prompt = (Message(role="user", content="Why?"),)
    uneven = PreferenceRow("a", prompt, "Because it is so. " * 9, "So.")  # padding, not prompt
    assert settle_sharing(None, model, [[encode_pair(uneven, template, 500)]], 10, 3, here)
    assert settle_sharing(True, model, short, 10, 3, here)
    assert not settle_sharing(False, model, long, 10, 3, here)
    plain = pair_forward._layout

    def windowed(found, *rest):
        """As a model with a window, for which a mask that is given is all there is."""
        positions, mask = plain(found, *rest)
        wide = max(len(p.chosen.ids) for p in found) > len(long[0][0].chosen.ids)
        return positions, None if wide else mask

    monkeypatch.setattr(pair_forward, "_layout", windowed)
    assert settle_sharing(None, model, long[:1] * 3, 10, 3, here)
    assert not settle_sharing(None, model, long + pairs("Why is it so? " * 30, "So."), 10, 3, here)

    def refused(*_):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(pair_forward, "_layout", refused)
    assert not settle_sharing(None, model, long, 10, 3, here)
    with pytest.raises(ConfigError, match=r"does not take the mask .*ValueError: too many values"):
        settle_sharing(True, model, long, 10, 3, here)
    monkeypatch.setattr(pair_forward, "_layout", lambda *given: (plain(*given)[0], None))
    assert not settle_sharing(None, model, long, 10, 3, here)
    with pytest.raises(ConfigError, match=r"share_prompts: this model scores a pair otherwise"):
        train_reward(small("reward", tmp_path / "run", {"share_prompts": True}))


def test_bf16_rounding_does_not_hide_that_prompts_can_be_shared(monkeypatch):
    here = World(0, 1, torch.device("cpu"))
    model = load_reward_model("tiny")
    rounded = copy.deepcopy(model).bfloat16()
    answers = [
        Encoded(list(range(9, 29)) + [token] * 7, [False] * 20 + [True] * 7) for token in (5, 6)
    ]
    steps = [[Pair(PreferenceRow("a", (), "", ""), *answers)]]
    with torch.no_grad():
        model.score.weight.mul_(300)
        score = forward_pairs(model, steps[0], 3, here, imitate=False, share_prompts=False).chosen
        model.offset = float(score)  # a score near 0 whose parts are large: rounding shows
    plain = pair_forward._layout

    def blind(*given):
        return plain(*given)[0], None

    for same in (model, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            assert settle_sharing(True, same, steps, 10, 3, here)
            with monkeypatch.context() as patch:
                patch.setattr(pair_forward, "_layout", blind)
                with pytest.raises(ConfigError, match="scores a pair otherwise"):
                    settle_sharing(True, same, steps, 10, 3, here)


@pytest.mark.slow
def test_an_ensemble_is_k_runs_exported_together(small, tmp_path):
    change = {"ensemble": 2, "heldout": 0.5, "max_steps": 2, "epochs": 2}
    run = train_reward(small("reward", tmp_path / "run", change))
    names = json.loads((run / "export" / "ensemble.json").read_text())["members"]
    assert names == ["member-0", "member-1"]
    alone = train_reward(
        small("reward", tmp_path / "alone", change | {"ensemble": None, "seed": 1})
    )
    weights = load_file(alone / "export" / "model.safetensors")
    second = load_file(run / "export" / "member-1" / "model.safetensors")
    assert all(torch.equal(weights[name], second[name]) for name in weights)
    first = run / "export" / "member-0"
    for file in first.iterdir():
        assert (run / "export" / file.name).read_bytes() == file.read_bytes()
    assert AutoModelForSequenceClassification.from_pretrained(run / "export").num_labels == 1
    assert not torch.equal(
        load_file(first / "model.safetensors")["score.weight"], second["score.weight"]
    )
    last = rows(run)[-1]
    losses = [rows(run / name)[-1]["eval/loss"] for name in names]
    assert last["eval/loss"] == pytest.approx(sum(losses) / 2)
    assert last["ensemble/loss"] <= last["eval/loss"] + 1e-6, "the loss is convex in the scores"
    assert last["ensemble/score_std"] > 0
    (run / "member-1" / "done.json").unlink()
    (run / "done.json").unlink()
    again = train_reward(small("reward", tmp_path / "run", change), resume=True)
    assert rows(again)[-1] == last


def test_the_card_says_what_the_model_was_made_of(small, tmp_path, small_data):
    import hashlib
    from pathlib import Path

    path = tmp_path / "pairs.jsonl"
    lines = [json.loads(line) for line in Path(small_data["pairs"]).read_text().splitlines()]
    for i, line in enumerate(lines):
        line["lang"] = ("en", "zh")[i % 2]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "heldout": 0.5, "licence": "mit", "system": "Be kind."}
    run = train_reward(small("reward", tmp_path / "run", change))
    card = json.loads((run / "export" / "reward_card.json").read_text())
    assert card["data"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (card["licence"], card["system"], card["heldout"]) == ("mit", "Be kind.", 0.5)
    assert "im_start" in card["template"]
    assert card["accuracy"]["all"] == pytest.approx(rows(run)[-1]["eval/accuracy"])
    parts = [card["accuracy_pairs"][f"lang: {lang}"] for lang in ("en", "zh")]
    assert sum(parts) == card["accuracy_pairs"]["all"] == card["counts"]["heldout"]
    weighted = sum(
        card["accuracy"][f"lang: {lang}"] * n for lang, n in zip(("en", "zh"), parts, strict=True)
    )
    assert weighted == pytest.approx(card["accuracy"]["all"] * sum(parts))
    assert set(card["length_correlation"]) == {
        "correlation of score and length",
        "within a pair, given the preference",
    }
    readme = (run / "export" / "README.md").read_text()
    assert "license: mit" in readme
    assert "held-out accuracy (lang: en)" in readme


@pytest.mark.slow
def test_thirty_steps_do_not_depend_on_micro_tokens(small, tmp_path):
    found = {}
    for micro in (1, 130, 260, 100_000):
        more = {"micro_tokens": micro, "max_steps": 30, "epochs": 30, "eval_every": 1000}
        more |= {"checkpoint": {"every": 1000}, "optim": {"lr": 1e-4}}
        found[micro] = rows(train_reward(small("reward", tmp_path / str(micro), more)))
    assert all(len(steps) == 30 for steps in found.values())
    for key in ("reward/loss", "reward/pair_loss", "reward/lm_loss", "reward/grad_norm"):
        expected = [row[key] for row in found[100_000]]
        for micro, steps in found.items():
            assert [row[key] for row in steps] == pytest.approx(expected, rel=1e-5), (micro, key)
