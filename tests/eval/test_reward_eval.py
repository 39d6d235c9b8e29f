"""Reward models judged from files: the same pairs for all, every baseline, what they were fed."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppomax.data.sources import SourceConfig, load_preferences
from ppomax.data.template import ChatTemplate
from ppomax.distributed import world
from ppomax.errors import ConfigError, DataError, ModelError
from ppomax.eval import local_judges, reward
from ppomax.eval.best_of_n import Candidates
from ppomax.eval.pairs import Reply, make_pair
from ppomax.eval.reward import evaluate_reward
from ppomax.eval.scorers import JudgingSettings, load_judge, log_likelihoods, score_candidates
from ppomax.models.export import read_reward_card
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer
from ppomax.report import write_preference_report
from ppomax.report.evaluation import preference_lines
from ppomax.train.pairs import encode_pair
from ppomax.types import Message, PreferenceRow


@pytest.fixture
def turned(small_reward, tmp_path):
    """The reward model with the sign of its head turned."""
    other = tmp_path / "turned"
    shutil.copytree(small_reward, other)
    tensors = load_file(other / "model.safetensors")
    tensors["score.weight"] = -tensors["score.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return str(other)


@pytest.fixture
def foreign(small_reward, tmp_path):
    """A reward model of another trainer: no card, and a template that writes on after the end."""
    folder = tmp_path / "foreign"
    shutil.copytree(small_reward, folder)
    (folder / "reward_card.json").unlink()
    return folder


def plain_score(folder, prompt, answer):
    """As the documentation of published reward models has it: template, classifier, logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    dialogue = [*prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert not text.endswith(ChatTemplate(tokenizer).end_text)
    batch = tokenizer([text], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model(batch["input_ids"]).logits.item()


@pytest.fixture
def several(tmp_path, tiny):
    """Pairs of two kinds, with several answers to each prompt."""
    path = tmp_path / "several.jsonl"
    answers = ["A short one.", "A longer answer than that one.", "No.", "Ask someone else, please."]
    lines = [
        {"prompt": f"What of {i}?", "responses": answers, "ranks": [1, 2, 3, 4], "level": i % 2}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def pairs_of(path):
    template = ChatTemplate(load_tokenizer("tiny"))
    rows = load_preferences([SourceConfig(path=path)]).rows
    return [encode_pair(row, template, 500) for row in rows]


@pytest.mark.slow
def test_scores_are_the_models_and_likelihoods_the_base_models(small_reward, several):
    found = evaluate_reward([small_reward], [several], language_model="tiny", by=["level"])
    pairs = pairs_of(several)
    model, lm = load_reward_model(small_reward, init_from_lm=False), load_policy("tiny")
    gaps, likelier, per_token = [], [], []
    with torch.no_grad():
        for pair in pairs:
            scores, sums = [], []
            for side in (pair.chosen, pair.rejected):
                ids = torch.tensor([side.ids])
                scores.append(float(model.scores(ids, torch.tensor([len(side.ids)]))))
                losses = F.cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:], reduction="none")
                sums.append(-float(losses[torch.tensor(side.mask[1:])].sum()))
            gaps.append(scores[0] - scores[1])
            likelier.append(sums[0] - sums[1])
            each = sums[0] / pair.chosen.num_targets - sums[1] / pair.rejected.num_targets
            per_token.append(each)
    assert found["num_pairs"] == len(pairs) == 24
    assert found["num_prompts"] == 4
    assert found["accuracy"]["right"] == sum(gap > 0 for gap in gaps)
    assert found["baselines"]["likelier wins"]["right"] == sum(gap > 0 for gap in likelier)
    by_token = found["baselines"]["likelier per token wins"]["right"]
    assert by_token == sum(gap > 0 for gap in per_token) != sum(gap > 0 for gap in likelier)
    assert found["histogram"]["mean"] == pytest.approx(np.mean(gaps), abs=1e-5)
    assert {(row["column"], row["value"]) for row in found["subsets"]} == {
        ("level", "0"),
        ("level", "1"),
    }
    groups = {(row["column"], row["value"], row["baseline"]) for row in found["differences"]}
    assert len(groups) == len(found["differences"]) == 3 * 4
    assert found["language_model"] == "tiny"


@pytest.mark.slow
def test_several_models_are_judged_on_the_same_pairs(small_reward, turned, several, tmp_path):
    found = evaluate_reward(
        [small_reward, turned], [several], language_model=None, gold=turned, by=["level"]
    )
    one, other = found["models"]
    assert one["accuracy"]["accuracy"] + other["accuracy"]["accuracy"] == pytest.approx(1)
    overall = found["comparisons"][0]
    expected = one["accuracy"]["accuracy"] - other["accuracy"]["accuracy"]
    assert overall["difference"] == pytest.approx(expected)
    assert (overall["only_first"], overall["only_second"]) == (
        one["accuracy"]["right"],
        other["accuracy"]["right"],
    )
    assert "bootstrap_ci95" in overall
    assert [row["value"] for row in found["comparisons"]] == ["all", "0", "1"]
    # the gold scorer is the second model: choosing by it gains, by its opposite loses
    curve = other["best_of_n"]
    assert curve["n"] == [1, 2, 4]
    assert curve["num_prompts"] == 4
    assert curve["gold"] == sorted(curve["gold"])
    assert curve["gold"] == pytest.approx(curve["proxy"])
    against = one["best_of_n"]["gold"]
    assert against == sorted(against, reverse=True)
    page = write_preference_report(found, tmp_path / "report.html").read_text()
    assert "Models side by side" in page
    assert page.count("<svg ") >= 8
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_candidates_come_from_files_of_replies(small_reward, several, tmp_path):
    path = tmp_path / "replies.jsonl"
    lines = [
        {"prompt": [{"role": "user", "content": f"Q{i}?"}], "response": f"Reply {k} " * (k + 1)}
        for i in range(3)
        for k in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"language_model": None, "gold": small_reward}
    curve = evaluate_reward([small_reward], [several], candidates=[str(path)], **options)
    assert curve["best_of_n"]["n"] == [1, 2, 4, 5]
    assert curve["best_of_n"]["num_prompts"] == 3
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(DataError, match="no prompt has two replies"):
        evaluate_reward([small_reward], [several], candidates=[str(path)], **options)


def test_the_default_language_model_is_what_the_card_names(small_reward, several, turned):
    assert evaluate_reward([small_reward], [several])["language_model"] == "tiny"
    card = Path(turned) / "reward_card.json"
    data = json.loads(card.read_text()) | {"source_model": "./gone"}
    card.write_text(json.dumps(data))
    found = evaluate_reward([turned], [several])
    assert found["language_model"] is None
    assert "gone" in found["notes"][0]
    assert "likelier wins" not in found["baselines"]
    with pytest.raises(ModelError, match="gone"):
        evaluate_reward([turned], [several], language_model="./gone")


def test_the_system_prompt_of_training_is_used(small, tmp_path, small_data):
    from ppomax.train.reward import train_reward

    change = {"system": "Answer in rhyme.", "heldout": 0.5, "max_steps": 1}
    run = train_reward(small("reward", tmp_path / "run", change))
    card = json.loads((run / "export" / "reward_card.json").read_text())
    found = evaluate_reward(
        [str(run / "export")], [small_data["pairs"]], heldout=0.5, language_model=None
    )
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert card["system"] == "Answer in rhyme."
    assert found["accuracy"]["accuracy"] == pytest.approx(last["eval/accuracy"])
    assert found["calibration"]["nll"] == pytest.approx(last["eval/loss"], rel=1e-4)
    assert found["warnings"] == []
    card["system"] = None
    (run / "export" / "reward_card.json").write_text(json.dumps(card))
    other = evaluate_reward(
        [str(run / "export")], [small_data["pairs"]], heldout=0.5, language_model=None
    )
    assert other["calibration"]["nll"] != found["calibration"]["nll"]


def test_pairs_that_were_trained_on_are_pointed_out(small_reward, small_data, several):
    found = evaluate_reward([small_reward], [small_data["pairs"]], language_model=None)
    assert any("have a prompt that the model was trained on" in note for note in found["warnings"])
    assert evaluate_reward([small_reward], [several], language_model=None)["warnings"] == []


def test_a_pair_whose_score_is_no_number_is_named(small_reward, turned, several):
    file = Path(turned) / "model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"] = tensors["score.weight"] * math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite, the first of pair .*several\.jsonl:1"):
        evaluate_reward([turned], [several], language_model=None)


def test_an_ensemble_is_judged_by_its_mean_and_shows_its_disagreement(
    small_reward, turned, several, tmp_path
):
    folder = tmp_path / "both"
    shutil.copytree(small_reward, folder)
    shutil.copytree(small_reward, folder / "member-0")
    shutil.copytree(turned, folder / "member-1")
    (folder / "ensemble.json").write_text('{"members": ["member-0", "member-1"]}')
    found = evaluate_reward([str(folder)], [several], language_model=None)
    card = read_reward_card(Path(small_reward))  # x and -x, each less the mean, in units of the std
    middle = -card.score_mean / card.score_std
    assert found["scores"]["chosen"]["max"] == pytest.approx(middle, abs=1e-5)
    assert found["scores"]["chosen"]["mean"] == pytest.approx(middle, abs=1e-5)
    assert found["ensemble"]["members"] == 2
    assert found["ensemble"]["pairs_in_dispute"] == pytest.approx(1)
    assert sum(found["ensemble"]["accuracies"]) == pytest.approx(1)
    (folder / "ensemble.json").write_text('{"members": ["member-2"]}')
    with pytest.raises(ModelError, match="member-2"):
        evaluate_reward([str(folder)], [several], language_model=None)


def test_candidates_of_an_ensemble_have_the_mean_of_standardized_scores(
    small_reward, several, tmp_path, monkeypatch
):
    folder = tmp_path / "both"
    shutil.copytree(small_reward, folder)
    shutil.copytree(small_reward, folder / "one")
    shutil.copytree(small_reward, folder / "other")
    card = json.loads((folder / "other" / "reward_card.json").read_text())
    card |= {"score_mean": card["score_mean"] + 1, "score_std": 3 * card["score_std"]}
    (folder / "other" / "reward_card.json").write_text(json.dumps(card))
    (folder / "ensemble.json").write_text('{"members": ["one", "other"]}')
    seen, plain = {}, reward.score_candidates

    def spy(judge, *args):
        seen[judge.name] = plain(judge, *args)
        return seen[judge.name]

    monkeypatch.setattr(reward, "score_candidates", spy)
    evaluate_reward([str(folder)], [several], language_model=None, gold=small_reward)
    own = read_reward_card(Path(small_reward))
    raw = seen[small_reward]
    shares = (raw - own.score_mean) / own.score_std, (raw - own.score_mean - 1) / own.score_std / 3
    np.testing.assert_allclose(seen[str(folder)], sum(shares) / 2, atol=1e-5)


@pytest.mark.slow
def test_a_model_of_another_trainer_scores_as_plain_transformers_does(foreign, several):
    found = evaluate_reward([str(foreign)], [several], language_model=None, gold=str(foreign))
    for row in found["worst"]:
        for side in ("chosen", "rejected"):
            plain = plain_score(foreign, row["prompt"], row[side])
            assert row[f"{side}_score"] == pytest.approx(plain, abs=1e-5)
    prompt, texts = ({"role": "user", "content": "What of 1?"},), ("No.", "A short one.")
    pair = make_pair("p", prompt, *(Reply(text, text) for text in texts))
    scores = local_judges._member_scores([(pair, text) for text in texts], str(foreign))
    plain = [plain_score(foreign, prompt, text) for text in texts]
    np.testing.assert_allclose(scores, plain, atol=1e-5)
    replies = Candidates([prompt, prompt], list(texts))
    settings = JudgingSettings()
    with world() as here:
        ours = score_candidates(load_judge(str(foreign), settings), replies, settings, here)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.slow
def test_a_model_of_another_trainer_without_a_template_is_refused(foreign, several):
    (foreign / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="ships no chat template"):
        evaluate_reward([str(foreign)], [several], language_model=None)
    with pytest.raises(ConfigError, match=r"judge reward:.*ships no chat template"):
        local_judges.by_reward_model([], str(foreign))


@pytest.mark.slow
def test_a_text_longer_than_a_models_positions_is_never_scored(small_reward, several, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(small_reward, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    with pytest.raises(ConfigError, match=r"max_length: 301 is more than the 300 pos.*short"):
        evaluate_reward([small_reward, str(folder)], [several], max_length=301)
    with pytest.raises(ConfigError, match=r"max_length: 301 is more than the 300 pos.*short"):
        evaluate_reward([small_reward], [several], gold=str(folder), max_length=301)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    with pytest.raises(DataError, match="fits 16 tokens"):
        evaluate_reward([small_reward, str(folder)], [several], language_model=None)


@pytest.mark.slow
def test_texts_longer_than_a_language_models_positions_are_no_baseline(tiny, several, tmp_path):
    lm = load_policy("tiny")
    lm.config.max_position_embeddings = 8
    lm.save_pretrained(tmp_path / "lm")
    load_tokenizer("tiny").save_pretrained(tmp_path / "lm")
    rows = load_preferences([SourceConfig(path=several)]).rows
    with world() as here, pytest.raises(DataError, match=r":1 does not fit 8 tokens of its tok"):
        log_likelihoods(str(tmp_path / "lm"), rows, JudgingSettings(), here)


def test_a_long_dialogue_is_cut_for_the_language_model_as_for_the_reward_model(tiny):
    turns = [
        Message(role=role, content=f"{word} and rain " * 6)
        for word in ("tea", "salt", "bread")
        for role in ("user", "assistant")
    ][:-1]
    row, last = (PreferenceRow("a", tuple(t), "A song.", "A duck.") for t in (turns, turns[-1:]))
    template = ChatTemplate(load_tokenizer("tiny"))
    whole, least = (encode_pair(each, template, 10_000) for each in (row, last))
    length = max(len(least.chosen.ids), len(least.rejected.ids))
    assert len(whole.chosen.ids) > 2 * length
    settings = JudgingSettings(max_length=length)
    with world() as here:
        found, same = (log_likelihoods("tiny", [each], settings, here) for each in (row, last))
    np.testing.assert_allclose(found, same)


@pytest.mark.slow
def test_what_is_thrown_away_is_counted_printed_and_on_the_page(small_reward, several, tmp_path):
    long = {"prompt": "word " * 600, "chosen": "A.", "rejected": "B."}
    empty = {"prompt": "What?", "chosen": "", "rejected": "B."}
    with Path(several).open("a") as file:
        file.write(f"{{no json\n{json.dumps(long)}\n{json.dumps(empty)}\n{{neither\n")
    found = evaluate_reward([small_reward], [several], language_model=None, max_length=300)
    assert found["quarantined"] == {"not-json": 2, "empty-answer": 1}
    assert (found["over_long"], found["num_pairs"]) == (1, 24)
    lines = preference_lines(found | {"warnings": ["3 of 24 pairs have a prompt"]})
    told = ["3 rows cannot be used (not-json 2, empty-answer 1)"]
    told.append("1 pairs left out: longer than 300 tokens")
    assert set(told) < set(lines)
    assert "warning: 3 of 24 pairs have a prompt" in lines
    length = found["length"] | {"longer_preferred_by_model": 0.95}
    assert any(
        line.startswith("warning: It follows length")
        for line in preference_lines(found | {"length": length})
    )
    page = write_preference_report(found, tmp_path / "page.html").read_text()
    assert all(line in page for line in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout": 1.5}, "heldout: a share between 0 and 1 is wanted, found 1.5"),
        ({"heldout": 0.0}, "found 0"),
        ({"by": ["levle"]}, "by: no pair has a column 'levle'; there are: .*level"),
        ({"heldout": 1e-9, "limit": 1}, None),
    ],
)
def test_options_without_effect_are_refused(small_reward, several, options, message, tmp_path):
    options |= {"language_model": None}
    if message:
        with pytest.raises(ConfigError, match=message):
            evaluate_reward([small_reward], [several], **options)
        return
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "What?", "chosen": "A.", "rejected": "B."}) + "\n")
    with pytest.raises(DataError, match="heldout: none of 1 pairs is held out"):
        evaluate_reward([small_reward], [str(one)], **options)
