"""Rewards from several models, ensembles, functions and steps, against plain transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppomax.config import parse
from ppomax.data.batching import plan_micro_batches
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ConfigError, ModelError, TrainingError
from ppomax.experience import FixedKL
from ppomax.models.ensembles import members
from ppomax.models.export import RewardCard, export_reward, read_reward_card
from ppomax.models.heads import ScalarModel
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.tiny import tiny_model, tiny_tokenizer
from ppomax.models.trunk import Trunks
from ppomax.normalise import RunningMoments
from ppomax.rollout.engine import Rollout
from ppomax.train import reward_scores
from ppomax.train.actors import load_actors
from ppomax.train.estimates import estimate
from ppomax.train.experience_batch import plan_updates, score
from ppomax.train.observe import observe
from ppomax.train.ppo import train_ppo
from ppomax.train.prompts import Prompt
from ppomax.train.reward_scores import judge
from ppomax.train.reward_settings import RewardSettings
from ppomax.train.reward_sources import load_sources
from ppomax.train.rewards import call_steps
from ppomax.types import PromptRow

CPU = torch.device("cpu")
HERE = World(0, 1, CPU)
QUESTIONS = ["What of tea?", "Why does it rain so much?", "Name a duck."]
ANSWERS = ["Tea is warm.\n\nDrink it.\n\nGood.", "Clouds.\n\n", "Sir Francis, 鸭子。"]
STATS = [(0.5, 2.0), (-1.0, 0.25), (3.0, 1.0)]
"""Mean and std on the three reward models' cards."""


def card(mean, std):
    return RewardCard("a", "b", [], mean, std, accuracy={"all": 0.5})


@pytest.fixture(scope="module")
def judges(tiny, tmp_path_factory):
    """Folders of three reward models with the policy's tokenizer, and of an ensemble of two."""
    root = tmp_path_factory.mktemp("judges")
    tokenizer = load_tokenizer("tiny")
    for place, (mean, std) in enumerate(STATS):
        model = ScalarModel.from_causal_lm(load_policy("tiny"), seed=place)
        folder = root / f"rm{place}"
        export_reward(model, tokenizer, folder, card={}, reward_card=card(mean, std))
    for place in (0, 1):
        shutil.copytree(root / f"rm{place}", root / "both" / f"member-{place}")
    (root / "both" / "ensemble.json").write_text('{"members": ["member-0", "member-1"]}')
    return root


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of reward functions."""
    (tmp_path / "source_functions.py").write_text(
        "CALLS = []\n"
        "def length(prompts, responses, *, ids, metadata):\n"
        "    return [float(len(text)) for text in responses]\n"
        "def second_none(prompts, responses, *, ids, metadata):\n"
        "    return [None if i == 'q1' else 1.0 for i in ids]\n"
        "def steps(prompts, steps, *, ids, metadata):\n"
        "    CALLS.append((prompts, steps, ids, metadata))\n"
        "    return [[float(len(text)) for text in reply] for reply in steps]\n"
        "def steps_but_one(prompts, steps, *, ids, metadata):\n"
        "    return [None if i == 'q0' else [2.0] * len(s) for i, s in zip(ids, steps)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "source_functions"


@pytest.fixture(scope="module")
def template(tiny):
    return ChatTemplate(load_tokenizer("tiny"))


@pytest.fixture(scope="module")
def replies(template):
    """A rollout of three replies and its prompts; the last reply is cut before its end token."""
    rows = [
        PromptRow(f"q{i}", ({"role": "user", "content": text},), {"lang": "en"})
        for i, text in enumerate(QUESTIONS)
    ]
    prompts = [Prompt(i, row, template.prompt(row.messages)) for i, row in enumerate(rows)]
    responses = [template.answer(text) for text in ANSWERS]
    responses[-1] = responses[-1][:-1]
    logprobs = [[-1.0] * len(ids) for ids in responses]
    rollout = Rollout([p.ids for p in prompts], responses, logprobs, [True, True, False])
    return rollout, prompts


@pytest.fixture
def judged(small, replies, template, tmp_path):
    """`judged(reward settings, more settings)`: what the sources say of the three replies."""

    def run(reward, more=None):
        rollout, prompts = replies
        config = small("ppo", tmp_path / "none", {"critic": "policy", **(more or {})})
        config = config.model_copy(update={"reward": parse(RewardSettings, reward)})
        sources = load_sources(config, template.tokenizer, template, HERE, Trunks(0))
        plan = plan_micro_batches([len(r) for r in rollout.responses], 20)
        return judge(rollout, prompts, plan, sources, template, config, HERE)

    return run


@pytest.fixture(scope="module")
def raw(judges, replies):
    """Each model's score of each reply alone, by plain transformers: [models, replies]."""
    rollout, _ = replies
    rows = [p + r for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    table = []
    for place in range(3):
        model = AutoModelForSequenceClassification.from_pretrained(judges / f"rm{place}").eval()
        with torch.no_grad():
            table.append([model(torch.tensor([ids])).logits.item() for ids in rows])
    return torch.tensor(table, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


# --- several models, functions, weights


def test_one_model_is_the_same_in_every_form(judged, judges, raw):
    for reward in ({"model": str(judges / "rm1")}, {"models": [str(judges / "rm1")]}):
        found = judged(reward)
        close(found.scores, raw[1])
        assert found.steps is None
        assert found.spread is None


def test_models_and_functions_are_added_up_by_weight(judged, judges, raw, functions):
    listed = [{"model": str(judges / "rm0"), "weight": 0.5}, {"model": str(judges / "rm2")}]
    length = {"callable": f"{functions}:length", "weight": -0.1}
    found = judged({"models": listed, "callables": [length]})
    expected = 0.5 * raw[0] + raw[2] - 0.1 * torch.tensor([float(len(text)) for text in ANSWERS])
    close(found.scores, expected)
    assert found.spread is None


def test_a_reply_that_one_source_sets_aside_is_set_aside(judged, judges, functions):
    for more in ({}, {"ensemble": "min"}):
        models = [str(judges / "rm0"), str(judges / "rm1")]
        found = judged({"models": models, "callables": [f"{functions}:second_none"], **more})
        assert torch.isnan(found.scores).tolist() == [False, True, False]


def standardized(raw):
    means, stds = torch.tensor(STATS, dtype=torch.float64).T
    return (raw - means[:, None]) / stds[:, None]


@pytest.mark.parametrize("kind", ["mean", "min", "mean_minus_variance"])
def test_an_ensemble_is_what_its_formula_says_of_standardized_members(judged, judges, raw, kind):
    coef = {"variance_coef": 0.7} if kind == "mean_minus_variance" else {}
    models = [str(judges / f"rm{place}") for place in range(3)]
    found = judged({"models": models, "ensemble": kind, **coef})
    columns = standardized(raw).T.tolist()
    expected = []
    for column in columns:
        mean = sum(column) / 3
        variance = sum((value - mean) ** 2 for value in column) / 3
        by_kind = {"mean": mean, "min": min(column), "mean_minus_variance": mean - 0.7 * variance}
        expected.append(by_kind[kind])
    close(found.scores, torch.tensor(expected))
    stds = [math.sqrt(sum((v - sum(c) / 3) ** 2 for v in c) / 3) for c in columns]
    close(found.spread, torch.tensor(stds))


@pytest.mark.slow
def test_a_folder_of_members_counts_as_their_mean_unless_told_otherwise(judged, judges, raw):
    both = str(judges / "both")
    pair = standardized(raw)[:2]
    found = judged({"model": both})
    close(found.scores, pair.mean(0))
    close(found.spread, (pair[0] - pair[1]).abs() / 2)
    close(judged({"model": both, "ensemble": "min"}).scores, pair.amin(0))
    listed = [{"model": both, "weight": 2.0}, {"model": str(judges / "rm2"), "weight": 3.0}]
    close(judged({"models": listed}).scores, 2 * pair.mean(0) + 3 * raw[2])
    whole = judged({"models": [both, str(judges / "rm2")], "ensemble": "mean"})
    close(whole.scores, standardized(raw).mean(0))


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"members": []}', '{"members": "a"}', '{"members": ["a", "a"]}']
)
def test_a_list_of_members_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(ModelError, match=r"ensemble\.json: wanted") as caught:
        members(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_member_that_is_not_there_is_named(judges, tmp_path):
    assert members(str(judges / "rm0")) == [str(judges / "rm0")]
    (tmp_path / "ensemble.json").write_text('{"members": ["gone"]}')
    with pytest.raises(ModelError, match="member 'gone' is no model folder"):
        members(str(tmp_path))


@pytest.mark.slow
def test_the_critic_starts_from_the_first_reward_model_in_its_units(small, judges):
    head = load_file(judges / "rm0" / "model.safetensors")["score.weight"]
    two = [str(judges / "rm0"), str(judges / "rm1")]
    card = read_reward_card(judges / "rm0")
    assert card.score_std == 2.0
    assert card.score_mean != 0
    mean = card.score_mean / 2.0
    for reward, expected, offset in (
        ({"model": str(judges / "both")}, head / 2.0, mean),
        ({"model": str(judges / "both"), "normalise": None}, head / 2.0, mean),
        ({"models": two, "normalise": None}, head, 0.0),
        ({"models": two}, head / 2.0, mean),
        ({"models": two, "normalise": "scale"}, head / 2.0, 0.0),
    ):
        config = small("ppo", Path("x"))
        config = config.model_copy(update={"reward": parse(RewardSettings, reward)})
        critic = load_actors(config, HERE).critic.model
        torch.testing.assert_close(critic.score.weight.detach(), expected)
        assert critic.offset == offset


def test_a_critic_s_reward_model_may_lie_under_the_home_folder(small, judges, monkeypatch):
    monkeypatch.setenv("HOME", str(judges))
    config = small("ppo", Path("x"))
    config = config.model_copy(update={"reward": parse(RewardSettings, {"model": "~/rm0"})})
    assert load_actors(config, HERE).critic.model.offset != 0


# --- models with words of their own

OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A classifier with another tokenizer and template and no card; `foreign(pad, positions)`."""
    made = {}

    def make(pad="<|pad|>", positions=512, tail="\n", with_card=False):
        key = (pad, positions, tail, with_card)
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("foreign") / "rm"
        tokenizer = tiny_tokenizer(["other words entirely, of tea and rain " * 40], 300)
        tokenizer.chat_template = OTHER_TEMPLATE.replace("\n", tail)
        lm = tiny_model(vocab_size=len(tokenizer), seed=7, max_positions=positions)
        model = ScalarModel.from_causal_lm(lm, seed=7)
        if with_card:
            export_reward(model, tokenizer, folder, card={}, reward_card=card(0.5, 2.0))
        else:
            model.save(folder, tokenizer)
            config = json.loads((folder / "config.json").read_text())
            config["pad_token_id"] = tokenizer.convert_tokens_to_ids(pad) if pad else None
            (folder / "config.json").write_text(json.dumps(config))
        made[key] = str(folder)
        return made[key]

    return make


def plain_scores(folder, messages):
    """As the documentation of published reward models has it: template, classifier, logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for dialogue in messages:
        text = tokenizer.apply_chat_template(dialogue, tokenize=False)
        batch = tokenizer([text], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            scores.append(model(batch["input_ids"]).logits.item())
    return torch.tensor(scores)


def dialogues():
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]


@pytest.mark.parametrize("tail", ["\n", ""], ids=["more after the end token", "nothing after it"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>", None])
def test_a_foreign_reward_model_scores_as_plain_transformers_does(pad, tail, judged, foreign):
    folder = foreign(pad, tail=tail)
    found = judged({"models": [{"model": folder, "retokenize": True}]}, {"micro_tokens": 40})
    close(found.scores, plain_scores(folder, dialogues()))


def test_where_a_foreign_model_reads_depends_on_its_pad(foreign):
    one, two = (
        plain_scores(foreign(pad, tail=""), dialogues()) for pad in ("<|pad|>", "<|im_end|>")
    )
    assert (one - two).abs().min() > 1e-4, "or the test above could not tell"


def test_a_foreign_model_stands_beside_others_with_its_weight(judged, judges, foreign, raw):
    folder = foreign()
    models = [str(judges / "rm0"), {"model": folder, "retokenize": True, "weight": 0.5}]
    found = judged({"models": models})
    close(found.scores, raw[0] + 0.5 * plain_scores(folder, dialogues()))


def test_a_foreign_model_of_ppomax_is_read_at_the_end_of_turn(judged, foreign):
    folder = foreign(with_card=True)
    found = judged({"models": [{"model": folder, "retokenize": True}]})
    own = ChatTemplate(load_tokenizer(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for place, dialogue in enumerate(dialogues()):
        ids = own.encode(dialogue).ids
        assert ids[-1] == own.end_id
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert float(found.scores[place]) == pytest.approx(expected, abs=1e-5)


def test_the_system_prompt_reaches_a_foreign_model(judged, foreign):
    folder = foreign()
    found = judged({"models": [{"model": folder, "retokenize": True}]}, {"system": "Be brief."})
    system = [{"role": "system", "content": "Be brief."}]
    close(found.scores, plain_scores(folder, [system + d for d in dialogues()]))


def test_a_reply_too_long_for_a_foreign_model_is_set_aside(judged, foreign):
    lengths = [
        len(ChatTemplate(load_tokenizer(foreign())).whole(dialogue)) for dialogue in dialogues()
    ]
    middle = sorted(lengths)[1]
    folder = foreign(positions=middle)
    found = judged({"models": [{"model": folder, "retokenize": True}]})
    assert torch.isnan(found.scores).tolist() == [length > middle for length in lengths]
    kept = ~torch.isnan(found.scores)
    close(found.scores[kept], plain_scores(foreign(), dialogues())[kept])
    none = judged({"models": [{"model": foreign(positions=8), "retokenize": True}]})
    assert bool(torch.isnan(none.scores).all())


def test_retokenize_is_asked_for_and_only_where_it_has_a_use(judged, judges, foreign, tmp_path):
    with pytest.raises(ConfigError, match=r"models\.0\.model: .*another tokenizer.*retokenize: tr"):
        judged({"models": [foreign()]})
    with pytest.raises(ConfigError, match="retokenize has no use"):
        judged({"models": [{"model": str(judges / "rm0"), "retokenize": True}]})
    bare = tmp_path / "bare"
    shutil.copytree(foreign(), bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="ships no chat template"):
        judged({"models": [{"model": str(bare), "retokenize": True}]})


# --- steps


def linear_places(template, ids, text, separator="\n\n"):
    """Last tokens of the steps, by walking token by token."""
    places, at = [], 0
    pieces = text.split(separator)
    for number, piece in enumerate(pieces):
        at = min(at + len(piece) + len(separator), len(text))
        if not piece.strip():
            continue
        last = not any(rest.strip() for rest in pieces[number + 1 :])
        walk = (n for n in range(len(ids)) if template.decode(ids[: n + 1])[:at] == text[:at])
        places.append(len(ids) - 1 if last else next(walk))
    return places


def test_each_step_is_paid_on_its_last_token(judged, functions, template, replies):
    import sys

    rollout, _ = replies
    found = judged({"process": f"{functions}:steps"})
    expected = torch.zeros(found.steps.shape)
    for row, text in enumerate(ANSWERS):
        numbers = [float(len(piece)) for piece in text.split("\n\n") if piece.strip()]
        places = linear_places(template, rollout.responses[row], text)
        for place, number in zip(places, numbers, strict=True):
            expected[row, place] += number
    assert torch.equal(found.steps, expected)
    assert len(expected[0].nonzero()) == 3
    assert torch.equal(found.scores, expected.sum(1)), "no outcome: the steps are all there is"
    prompts, steps, ids, metadata = sys.modules[functions].CALLS[-1]
    assert prompts[1] == [{"role": "user", "content": QUESTIONS[1]}]
    assert steps == [["Tea is warm.", "Drink it.", "Good."], ["Clouds."], [ANSWERS[2]]]
    assert (ids, metadata) == (["q0", "q1", "q2"], [{"lang": "en"}] * 3)


def test_another_separator_cuts_elsewhere(judged, functions):
    found = judged({"process": f"{functions}:steps", "step_separator": "."})
    assert [int((row != 0).sum()) for row in found.steps] == [3, 1, 1]


def test_a_reply_whose_steps_are_none_is_set_aside(judged, judges, functions):
    found = judged({"process": f"{functions}:steps_but_one"})
    assert torch.isnan(found.scores).tolist() == [True, False, False]
    assert not bool(torch.isnan(found.steps).any())
    assert found.steps[1:].sum(1).tolist() == [2.0, 2.0]


def test_outcome_and_steps_are_one_total(judged, judges, functions, raw):
    found = judged({"models": [str(judges / "rm0")], "process": f"{functions}:steps"})
    close(found.scores, raw[0] + found.steps.sum(1))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([[1.0]], "process function: 2 lists wanted, found 1"),
        ([[1.0], [2.0]], "2 step rewards of reply 0 wanted, found 1"),
        ([[1.0, 2.0], ["x"]], "one number each wanted for step rewards of reply 1"),
        ([[1.0, math.inf], [1.0]], "infinite"),
        ([1.0, 2.0], "2 step rewards of reply 0 wanted, found float"),
    ],
)
def test_what_is_not_one_number_per_step_stops_the_run(answer, text):
    prompts = [({"role": "user", "content": "a"},)] * 2
    with pytest.raises(TrainingError, match=text):
        call_steps(
            lambda *_, **__: answer,
            prompts,
            [["one", "two"], ["three"]],
            ["a", "b"],
            [{}, {}],
            timeout=5,
            retries=0,
        )


def experience(small, replies, tmp_path, reward, moments):
    rollout, prompts = replies
    change = {"critic": "policy", "kl": None, "minibatch_size": 4, "micro_tokens": 60}
    config = small("ppo", tmp_path / "none", change)
    config = config.model_copy(update={"reward": parse(RewardSettings, reward)})
    actors = load_actors(config, HERE)
    plan = plan_updates(rollout, config, HERE, "ppo", 1, 0)
    scored = score(rollout, prompts, plan, actors, config, HERE)
    return estimate(rollout, scored, moments, FixedKL(0.0), config), config


def test_step_rewards_are_scaled_by_the_std_of_totals_and_not_shifted(
    small, replies, functions, tmp_path
):
    moments = RunningMoments()
    moments.update(torch.tensor([3.0, 9.0]))
    reward = {"process": f"{functions}:steps", "clip": 1.5}
    found, _ = experience(small, replies, tmp_path, reward, moments)
    steps = found.scored.steps
    history = torch.cat([torch.tensor([3.0, 9.0]), steps.sum(1)])
    std = float(history.std())
    close(found.rewards, (steps / std).clamp(-1.5, 1.5))
    assert float((steps / std).max()) > 1.5, "the clip acts"
    assert moments.count == 5
    assert moments.mean == pytest.approx(float(history.mean()))


def test_beside_an_outcome_the_mean_is_taken_off_the_outcome_alone(
    small, replies, functions, judges, raw, tmp_path
):
    reward = {"models": [str(judges / "rm0")], "process": f"{functions}:steps", "clip": None}
    found, config = experience(small, replies, tmp_path, reward, RunningMoments())
    steps = found.scored.steps.double()
    totals = raw[0] + steps.sum(1)
    expected = steps / totals.std()
    for row, ids in enumerate(replies[0].responses):
        expected[row, len(ids) - 1] += (raw[0, row] - totals.mean()) / totals.std()
    close(found.rewards, expected)
    close(found.rewards.sum(1), (totals - totals.mean()) / totals.std())
    assert observe(found, config)["reward/score_mean"] == pytest.approx(float(totals.mean()))


# --- refusals


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        ({"model": "a", "callable": "m:f"}, "not both; to add up several sources"),
        ({"model": "a", "models": ["b"]}, "give model or models, not both"),
        ({"callable": "m:f", "callables": ["m:g"]}, "give callable or callables, not both"),
        ({"models": ["a", {"model": "a"}]}, "models: a stands twice"),
        ({"models": [{"model": "a", "weight": 0}]}, "weight 0 has no effect"),
        ({"callables": [{"callable": "m:f", "weight": 0}]}, "weight 0 has no effect"),
        ({"models": [{"weight": 1.0}]}, "model is missing"),
        ({"ensemble": "mean", "callable": "m:f"}, "ensemble has no effect without reward models"),
        (
            {"models": ["a", {"model": "b", "weight": 2}], "ensemble": "min"},
            "weight has no effect with ensemble",
        ),
        ({"models": ["a", "b"], "ensemble": "mean_minus_variance"}, "needs variance_coef"),
        ({"models": ["a", "b"], "variance_coef": 1.0}, "variance_coef has no effect"),
        ({"models": ["a", "b"], "ensemble": "min", "variance_coef": 1.0}, "variance_coef has no"),
        ({"models": ["a", "b"], "ensemble": "max"}, "'mean', 'min' or 'mean_minus_variance'"),
        ({"model": "a", "step_separator": "\n"}, "step_separator has no effect without process"),
        ({"process": "m:f", "step_separator": ""}, "step_separator"),
        ({"models": ["a"], "timeout": 5.0}, "timeout has no effect"),
    ],
)
def test_a_combination_without_sense_is_refused(reward, text):
    with pytest.raises(ConfigError, match=text) as caught:
        parse(RewardSettings, reward)
    assert "\n" not in str(caught.value)


def test_what_only_the_folders_show_is_refused_at_start(judged, judges, foreign):
    with pytest.raises(ConfigError, match=r"ppo\.reward\.ensemble: .*rm0 is one reward model"):
        judged({"model": str(judges / "rm0"), "ensemble": "mean"})
    models = [str(judges / "rm0"), {"model": foreign(), "retokenize": True}]
    with pytest.raises(
        ConfigError, match=r"models\.1\.model: .*reward_card\.json, whose score_mean"
    ):
        judged({"models": models, "ensemble": "mean"})
    with pytest.raises(ConfigError, match=r"ppo\.reward\.process: 'nowhere:f' cannot be imported"):
        judged({"process": "nowhere:f"})
    with pytest.raises(ConfigError, match=r"callables\.1\.callable: 'nowhere:g'"):
        judged({"callables": ["math:sqrt", "nowhere:g"]})


def test_a_critic_needs_a_reward_model_it_can_read(small, tmp_path):
    for reward, text in (
        ({"callables": ["m:f"]}, "critic: reward needs a reward model"),
        ({"process": "m:f"}, "critic: reward needs a reward model"),
        ({"models": [{"model": "a", "retokenize": True}]}, "the policy's tokenizer"),
    ):
        with pytest.raises(ConfigError, match=text):
            small("ppo", tmp_path, {"reward": {"model": None} | reward})


# --- in a run


def settings_of_everything(small, out, judges, functions, foreign):
    reward = {
        "model": None,
        "models": [
            str(judges / "rm0"),
            str(judges / "both"),
            {"model": foreign(with_card=True), "retokenize": True},
        ],
        "ensemble": "mean_minus_variance",
        "variance_coef": 0.1,
        "callables": [{"callable": f"{functions}:length", "weight": 0.1}],
        "process": f"{functions}:steps",
        "step_separator": "e",
    }
    return small("ppo", out, {"reward": reward, "critic_pretraining": {"max_rollouts": 1}})


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_run_takes_all_sources_at_once_and_says_how_far_they_disagree(
    small, tmp_path, judges, functions, foreign
):
    out = train_ppo(settings_of_everything(small, tmp_path / "run", judges, functions, foreign))
    rows = jsonl(out / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["reward/ensemble_std"] > 0
        assert all(math.isfinite(value) for key, value in row.items() if key != "stage")
        assert row.get("policy/first_ratio_error", 0.0) == 0.0


def test_ranks_ask_a_function_for_their_share_and_each_knows_all_it_said(
    small, replies, template, tmp_path, monkeypatch
):
    rollout, prompts = replies
    config = small("ppo", tmp_path / "none", {"critic": "policy"})
    asked = []

    def thirds(prompts, responses, *, ids, metadata):
        asked.append(ids)
        pairs = zip(ids, responses, strict=True)
        return [None if name == "q1" else len(text) / 3 for name, text in pairs]

    monkeypatch.setattr(reward_scores, "sum_tensor", lambda tensor, here: tensor)
    parts = [
        reward_scores.called_scores(thirds, rollout, prompts, template, config, World(rank, 2, CPU))
        for rank in (0, 1)
    ]
    assert [list(ids) for ids in asked] == [["q0", "q2"], ["q1"]]
    texts = [template.decode(ids) for ids in rollout.responses]
    expected = torch.tensor([len(texts[0]) / 3, math.nan, len(texts[2]) / 3], dtype=torch.float64)
    torch.testing.assert_close(sum(parts), expected, rtol=0, atol=0, equal_nan=True)


def test_a_second_scorer_is_one_model_that_reads_the_policys_ids(small, judges, foreign, tmp_path):
    wrong = {"holds 2 models": judges / "both", "another tokenizer or chat template": foreign()}
    for words, model in wrong.items():
        change = {"heldout": 0.6, "monitor": {"track": {"model": str(model)}}}
        with pytest.raises(ConfigError, match=rf"setting ppo.monitor.track.model: .*{words}"):
            train_ppo(small("ppo", tmp_path / words, change))


@pytest.mark.slow
def test_two_ranks_score_as_one_process_does(small, tmp_path, judges, functions, foreign, launch):
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        config = settings_of_everything(small, out, judges, functions, foreign)
        config = json.loads(config.model_dump_json())
        ended = launch(ranks=ranks, stages=[("ppo", config, False)], path=[str(tmp_path)])
        assert [end.code for end in ended] == [0] * ranks, ended[0].log[-2000:]
        found.append(jsonl(out / "metrics.jsonl"))
    for one, two in zip(*found, strict=True):
        assert set(one) == set(two)
        for key, value in one.items():
            if not isinstance(value, str) and not key.startswith(("time", "throughput", "memory")):
                assert two[key] == pytest.approx(value, rel=1e-4, abs=2e-6), key
