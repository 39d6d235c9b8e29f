import json
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppomax.errors import ModelError
from ppomax.models.export import (
    RewardCard,
    escape,
    export_policy,
    export_reward,
    model_card,
    read_reward_card,
    source_licence,
    template_hash,
    tokenizer_hash,
)
from ppomax.models.folders import atomic_folder
from ppomax.models.heads import ScalarModel
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ["the sea is wide and the ship is small", "rice, water, salt"] * 20
IDS = torch.tensor([[5, 9, 20, 31, 7, 8], [40, 3, 12, 6, 90, 11]])
CARD = {"title": "A policy", "source_model": "org/base", "licence": "apache-2.0"}
REWARD_CARD = RewardCard(
    tokenizer_hash="a",
    template_hash="b",
    score_mean=0.25,
    score_std=1.5,
    probes=[{"messages": [{"role": "user", "content": "嗨"}], "score": -0.125}],
    accuracy={"all": 0.75},
    counts={"train": 10},
    licence="apache-2.0",
)


def tokenizer():
    return tiny_tokenizer(TEXTS, 300)


def model(lora=False, **kwargs):
    plain = tiny_model(vocab_size=300, hidden_size=32, intermediate=48, **kwargs)
    if lora:
        add_lora(plain, LoraSettings(rank=4), seed=0)
        for name, parameter in plain.named_parameters():
            if ".lora_B." in name:
                parameter.data.fill_(0.02)
    return plain


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_policy_is_the_same_in_plain_transformers(tmp_path, lora, tied):
    policy = model(lora, tied=tied)
    export_policy(policy, tokenizer(), tmp_path / "out", card=CARD)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (plain(IDS).logits - policy(IDS).logits).abs().max() < 1e-5
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer())
    assert (load_policy(str(tmp_path / "out"))(IDS).logits - plain(IDS).logits).abs().max() < 1e-5


def test_others_may_read_the_weights_where_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "m") as place:
            save_file({"a": torch.zeros(2)}, place / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_an_exported_adapter_is_the_same_in_plain_peft(tmp_path):
    from peft import PeftModel

    policy = model(lora=True)
    card = CARD | {"source_model": "base"}
    export_policy(policy, tokenizer(), tmp_path / "out", card=card, mode="adapter")
    plain = PeftModel.from_pretrained(model(), tmp_path / "out").eval()
    assert (plain(IDS).logits - policy(IDS).logits).abs().max() < 1e-5
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_export_needs_an_adapter(tmp_path):
    with pytest.raises(ModelError, match="merged"):
        export_policy(model(), tokenizer(), tmp_path / "out", card=CARD, mode="adapter")
    assert not list(tmp_path.iterdir())


def test_weights_can_be_written_in_another_dtype(tmp_path):
    policy = model()
    export_policy(policy, tokenizer(), tmp_path / "out", card=CARD, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert policy.dtype == torch.float32
    assert torch.equal(plain.lm_head.weight, policy.lm_head.weight.bfloat16())


def test_the_generation_config_holds_the_ends_and_what_is_passed(tmp_path):
    def written(**kwargs):
        export_policy(model(), tokenizer(), tmp_path / "out", card=CARD, **kwargs)
        data = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        data.pop("transformers_version")
        return data

    assert written() == {"eos_token_id": 2, "pad_token_id": 3}
    sampling = written(generation={"temperature": 0.8, "top_p": 0.9})
    assert sampling == {
        "eos_token_id": 2,
        "pad_token_id": 3,
        "temperature": 0.8,
        "top_p": 0.9,
        "do_sample": True,
    }


def test_a_gathered_state_dict_is_what_is_written(tmp_path):
    policy = model(lora=True)
    expected = policy(IDS).logits
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for parameter in policy.parameters():
        parameter.data.zero_()
    export_policy(policy, tokenizer(), tmp_path / "out", card=CARD, state=state)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (plain(IDS).logits - expected).abs().max() < 1e-5


def test_an_exported_reward_model_is_the_same_in_plain_transformers(tmp_path):
    names = tokenizer()
    scalar = ScalarModel.from_causal_lm(model(lora=True, tied=False), seed=0)
    export_reward(scalar, names, tmp_path / "rm", card=CARD, reward_card=REWARD_CARD)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    scores = scalar.scores(IDS, torch.tensor([6, 6]))
    assert (plain(IDS).logits[:, 0] - scores).abs().max() < 1e-5
    assert read_reward_card(tmp_path / "rm") == REWARD_CARD


def test_a_missing_or_broken_reward_card_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"reward_card\.json: missing"):
        read_reward_card(tmp_path)
    for text in ("{", "[]", '{"probes": []}'):
        (tmp_path / "reward_card.json").write_text(text)
        with pytest.raises(ModelError, match="not a reward card"):
            read_reward_card(tmp_path)


def test_a_tokenizers_hash_survives_saving_and_use(tmp_path):
    names = tokenizer()
    expected = tokenizer_hash(names)
    names(["a", "the sea is wide"], padding=True, truncation=True, max_length=8)
    assert tokenizer_hash(names) == expected
    names.save_pretrained(tmp_path / "t")
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "t")) == expected


def test_a_tokenizers_hash_sees_vocabulary_special_ids_and_template():
    hashes = {
        tokenizer_hash(tokenizer()),
        tokenizer_hash(tiny_tokenizer([*TEXTS, "zebra zebra"], 300)),
    }
    padded, templated = tokenizer(), tokenizer()
    padded.pad_token = "<|endoftext|>"
    templated.chat_template += " "
    hashes |= {tokenizer_hash(padded), tokenizer_hash(templated)}
    assert len(hashes) == 4
    assert template_hash(templated) != template_hash(padded)


HOSTILE = "x\n---\n# head <script>alert(1)</script> [a](http://b) | ![i](j) `c` {{d}} license: mit"


def test_a_card_escapes_what_a_run_puts_into_it():
    card = {
        "title": HOSTILE,
        "summary": HOSTILE,
        "source_model": HOSTILE,
        "licence": HOSTILE,
        "datasets": [HOSTILE],
        "numbers": {HOSTILE: HOSTILE},
        "settings": {"a": HOSTILE},
    }
    text = model_card(card, pipeline="text-generation")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == " ".join(HOSTILE.split())
    assert "base_model" not in yaml.safe_load(head)
    assert "<script" not in body
    assert "\n---" not in body
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# " + escape(HOSTILE)]
    rows = [line for line in body.splitlines() if line.startswith("|") and "head" in line]
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
    assert "![" not in body.replace("\\!", "")


def test_a_card_shows_the_runs_numbers_and_source():
    card = CARD | {"numbers": {"reward": 1.23456, "steps": 30}, "summary": "1. made so"}
    text = model_card(card, pipeline="text-generation")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "org/base"
    assert "| reward | 1.235 |" in text
    assert "| steps | 30 |" in text
    assert "\n1\\. made so" in text


def test_a_sources_licence_is_read_from_its_card(tmp_path):
    assert source_licence(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert source_licence(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("# no head\n")
    assert source_licence(tmp_path) is None
    export_policy(model(), tokenizer(), tmp_path / "out", card=CARD)
    assert source_licence(tmp_path / "out") == "apache-2.0"


def test_a_folder_is_replaced_whole_or_left_as_it_was(tmp_path):
    folder = tmp_path / "out"
    with atomic_folder(folder) as place:
        (place / "old").write_text("1")

    def interrupted():
        with atomic_folder(folder) as place:
            (place / "half").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in folder.iterdir()] == ["old"]
    with atomic_folder(folder) as place:
        (place / "new").write_text("3")
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_exported_tokenizer_still_pads_with_its_own_token(tmp_path):
    export_policy(model(), tokenizer(), tmp_path / "out", card=CARD)
    loaded = load_tokenizer(str(tmp_path / "out"))
    assert loaded.pad_token_id == tokenizer().pad_token_id != loaded.eos_token_id
