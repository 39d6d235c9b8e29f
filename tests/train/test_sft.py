"""Supervised fine-tuning against plain transformers, under any micro-batches, to over-fitting."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppomax.data.template import ChatTemplate
from ppomax.errors import ConfigError, DataError
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.train.sft import SFTConfig, encode_dialogue, load_data, train_sft
from ppomax.types import Message, SFTRow

TIMES = ("time", "throughput/", "memory/")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(run):
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in jsonl(run / "metrics.jsonl")
    ]


def nll(model, encoded):
    """Summed NLL of the targets of some dialogues and their number, one by one."""
    total, count = 0.0, 0
    for row in encoded:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        mask = torch.tensor(row.mask[1:])
        total += float(losses[mask].sum())
        count += int(mask.sum())
    return total, count


@pytest.fixture
def template(tiny):
    return ChatTemplate(load_tokenizer("tiny"))


def test_the_loss_is_transformers_cross_entropy_on_the_assistants_tokens(small, tmp_path, template):
    config = small("sft", tmp_path / "run", {"max_steps": 1, "micro_tokens": 60})
    found = rows(train_sft(config))
    data = load_data(config, template)
    model = load_policy("tiny")
    total, count = nll(model, [data.train[i] for i in data.steps[0]])
    assert found[0]["batch/tokens"] == count
    assert found[0]["sft/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found[0]["sft/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    total, count = nll(trained, data.heldout)
    assert found[-1]["eval/loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_the_gradient_norm_is_autograds(small, tmp_path, template):
    config = small("sft", tmp_path / "run", {"max_steps": 1, "micro_tokens": 60})
    found = rows(train_sft(config))
    data, model = load_data(config, template), load_policy("tiny")
    batch = [data.train[i] for i in data.steps[0]]
    count = sum(row.num_targets for row in batch)
    for row in batch:
        ids = torch.tensor([row.ids])
        losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        (losses[torch.tensor(row.mask[1:])].sum() / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert found[0]["sft/grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_19_micro_batches_from_one_dialogue_up_to_all_change_nothing(change, small, tmp_path):
    found = []
    for micro in (1, 90, 100_000):
        more = {"micro_tokens": micro, "max_steps": 3, "epochs": 3, "batch_tokens": 200}
        run = train_sft(small("sft", tmp_path / str(micro), change | more))
        found.append((rows(run), load_file(run / "export" / "model.safetensors")))
    for other, weights in found[1:]:
        for one, two in zip(found[0][0], other, strict=True):
            numbers = {k: v for k, v in one.items() if k != "stage"}
            assert {k: two[k] for k in numbers} == pytest.approx(numbers, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=1e-5)


def test_only_the_assistants_words_and_end_tokens_are_targets(template):
    talk = [
        Message(role="user", content="How?"),
        Message(role="assistant", content="Like this."),
        Message(role="user", content="And then?"),
        Message(role="assistant", content="Then that."),
    ]
    encoded = encode_dialogue(SFTRow("a", tuple(talk)), template, 200)
    learned = [token for token, target in zip(encoded.ids, encoded.mask, strict=True) if target]
    text = template.tokenizer.decode(learned)
    assert text == "Like this.<|im_end|>Then that.<|im_end|>"


def test_older_turns_are_dropped_until_a_dialogue_fits_and_the_answer_never_cut(template):
    old = [Message(role="user", content="long " * 30), Message(role="assistant", content="ok")]
    last = [Message(role="user", content="Short?"), Message(role="assistant", content="Yes.")]
    whole = encode_dialogue(SFTRow("a", tuple(old + last)), template, 1000)
    alone = encode_dialogue(SFTRow("a", tuple(last)), template, 1000)
    assert len(whole.ids) > 2 * len(alone.ids)
    for limit in range(len(alone.ids), len(whole.ids)):
        assert encode_dialogue(SFTRow("a", tuple(old + last)), template, limit) == alone
    assert encode_dialogue(SFTRow("a", tuple(last)), template, len(alone.ids) - 1) is None


def test_dialogues_that_cannot_fit_are_set_aside_with_their_line(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "A?", "completion": "B"}, {"prompt": "C?", "completion": "D " * 300}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "heldout": 0.0, "max_bad_rows": 0.5}
    run = train_sft(small("sft", tmp_path / "run", change))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "quarantined_row"]
    assert [(row["where"], row["defect"]) for row in events] == [(f"{path}:2", "too-long")]
    assert "eval/loss" not in rows(run)[-1]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"max_length": 9}, DataError, "max_length: no dialogue fits 9 tokens"),
        ({"max_length": 513}, ConfigError, "max_length: 513 is more than the 512 positions"),
        ({"data": "no/such/file.jsonl"}, DataError, r"file\.jsonl"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(change, error, text, small, tmp_path):
    with pytest.raises(error, match=text) as caught:
        train_sft(small("sft", tmp_path / "run", change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "done.json").exists()


def test_every_dialogue_comes_once_an_epoch_and_held_out_prompts_never(small, tmp_path, template):
    config = small("sft", tmp_path, {"epochs": 3, "max_steps": None})
    data = load_data(config, template)
    seen = [index for step in data.steps for index in step]
    assert sorted(seen) == sorted(list(range(len(data.train))) * 3)
    first = seen[: len(data.train)], seen[len(data.train) : 2 * len(data.train)]
    assert first[0] != first[1]
    assert not {tuple(row.ids) for row in data.train} & {tuple(row.ids) for row in data.heldout}


def test_the_schedule_runs_over_all_steps(small, tmp_path):
    optim = {"lr": 1e-3, "schedule": "linear", "warmup": 0.5, "floor": 0.0}
    change = {"optim": optim, "epochs": 2, "max_steps": 4}
    found = rows(train_sft(small("sft", tmp_path / "run", change)))
    assert [row["sft/lr"] for row in found] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_the_export_is_a_folder_anyone_can_load(small, tmp_path, tiny):
    run = train_sft(small("sft", tmp_path / "run"))
    names = {path.name for path in (run / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert {"generation_config.json", "chat_template.jinja"} <= names
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    ids = AutoTokenizer.from_pretrained(run / "export")("Hello", return_tensors="pt").input_ids
    ours = load_policy(str(run / "export"))
    torch.testing.assert_close(model(ids).logits, ours(ids).logits)
    assert not torch.equal(model(ids).logits, load_policy("tiny")(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_and_exports_a_plain_model(dtype, small, tmp_path, tiny):
    change = {"lora": {"rank": 4, "alpha": 8.0}, "max_steps": 4, "epochs": 4, "dtype": dtype}
    run = train_sft(small("sft", tmp_path / "run", change))
    before, after = (
        load_file(f"{tiny}/model.safetensors"),
        load_file(run / "export/model.safetensors"),
    )
    assert set(before) == set(after)
    assert torch.equal(
        after["model.embed_tokens.weight"].float(), before["model.embed_tokens.weight"]
    ) == (dtype == "float32")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[name].float(), before[name].to(after[name].dtype).float())
    saved = load_file(max((run / "checkpoints").iterdir()) / "policy.safetensors")
    assert all("lora_" in key for key in saved)


@pytest.mark.slow
def test_it_overfits_a_small_set(small, tmp_path):
    change = {
        "heldout": 0.0,
        "epochs": 150,
        "max_steps": None,
        "batch_tokens": 10_000,
        "optim": {"lr": 1e-2, "grad_clip": 1.0, "schedule": "cosine", "floor": 0.1},
        "checkpoint": {"every": 1000},
    }
    found = rows(train_sft(small("sft", tmp_path / "run", change)))
    assert found[0]["sft/loss"] > 5
    assert found[-1]["sft/loss"] < 0.3


def test_settings_have_the_papers_defaults():
    config = SFTConfig(model="m", data=["d"], out="o")
    assert (config.epochs, config.optim.schedule, config.optim.floor) == (2, "cosine", 0.1)


@pytest.mark.slow
def test_held_out_perplexity_is_given_by_language(small, tmp_path, template):
    path = tmp_path / "rows.jsonl"
    lines = [
        {
            "prompt": f"Say {i}.",
            "completion": f"{i} and {i}" * (1 + i % 3),
            "lang": ("en", "zh-CN")[i % 2],
        }
        for i in range(16)
    ]
    del lines[0]["lang"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "heldout": 0.6, "max_steps": 1, "micro_tokens": 70}
    config = small("sft", tmp_path / "run", change)
    found = rows(train_sft(config))[0]
    data = load_data(config, template)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    for key, lang in (("en", "en"), ("zh_cn", "zh-CN")):
        own = [
            encoded
            for encoded, row in zip(data.heldout, data.heldout_rows, strict=True)
            if row.meta.get("lang") == lang
        ]
        total, count = nll(trained, own)
        assert found[f"eval/perplexity_{key}"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found["eval/perplexity"] == pytest.approx(math.exp(found["eval/loss"]))
    plain = rows(train_sft(small("sft", tmp_path / "plain", change | {"eval_by": None})))[0]
    assert set(found) - set(plain) == {"eval/perplexity_en", "eval/perplexity_zh_cn"}


@pytest.mark.slow
def test_the_log_holds_replies_to_held_out_prompts(small, tmp_path, template):
    change = {"log": {"samples": 2}, "heldout": 0.5, "max_steps": 1}
    config = small("sft", tmp_path / "run", change)
    found = jsonl(train_sft(config) / "samples.jsonl")
    heldout = load_data(config, template).heldout_rows
    assert [row["id"] for row in found] == [row.id for row in heldout[:2]]
    for row, said in zip(heldout, found, strict=False):
        assert said["prompt"] == list(row.messages[:-1])
        assert said["wanted"] == row.messages[-1]["content"]
        assert said["response"] != ""
        assert 0 < said["length"] <= 64


@pytest.mark.slow
def test_the_system_prompt_of_training_is_the_default_when_it_writes(
    small, tmp_path, small_data, monkeypatch
):
    from ppomax.eval import generate, writing
    from ppomax.rollout import SamplingParams

    used = []

    class Noted(ChatTemplate):
        def __init__(self, tokenizer, system=None):
            used.append(system)
            super().__init__(tokenizer, system)

    monkeypatch.setattr(generate, "ChatTemplate", Noted)
    run = train_sft(small("sft", tmp_path / "run", {"system": "Answer in rhyme.", "max_steps": 1}))
    plain = train_sft(small("sft", tmp_path / "plain", {"max_steps": 1}))
    params = SamplingParams(temperature=0, max_new_tokens=2)
    for model in (run, plain):
        for system in (None, "No."):
            options = {"seed": 0, "dtype": "float32", "limit": 1, "system": system}
            out = tmp_path / "replies.jsonl"
            writing.generate_file(
                str(model / "export"), small_data["prompts"], out, params, **options
            )
            generate.Chat(str(model / "export"), params, seed=0, system=system)
    assert used[::2] == used[1::2] == ["Answer in rhyme.", "No.", None, "No."]


def test_values_of_any_script_keep_their_own_perplexity():
    from ppomax.train.sft import language_of
    from ppomax.types import SFTRow

    def named(value):
        row = SFTRow("a", ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))
        row.meta["lang"] = value
        return language_of(row, "lang")

    assert [named(v) for v in ("中文", "日本", "zh-CN", "En")] == ["中文", "日本", "zh_cn", "en"]
