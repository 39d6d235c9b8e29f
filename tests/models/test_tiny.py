import json

import pytest
import torch

from ppomax.models import tiny
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer
from ppomax.models.names import resolve
from ppomax.models.tiny import build_tiny, tiny_model, tiny_tokenizer

TEXTS = [
    "How do I boil an egg?",
    "水烧开后放入鸡蛋。",
    "Put it in boiling water for 8 minutes.",
] * 30
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well."},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def bundled(monkeypatch):
    def use(*texts):
        rows = [
            {"prompt": [{"role": "user", "content": t}], "chosen": t, "rejected": "x"}
            for t in texts
        ]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        monkeypatch.setattr(tiny, "_bundled_text", lambda: lines)

    use(*TEXTS)
    return use


def test_the_same_texts_give_the_same_tokenizer():
    first, again = (tiny_tokenizer(TEXTS, 400).backend_tokenizer.to_str() for _ in range(2))
    assert first == again


def test_any_text_goes_in_and_comes_out_unchanged():
    tokenizer = tiny_tokenizer(TEXTS, 400)
    assert len(tokenizer) <= 400
    for text in ("  two  spaces\n\tand a tab ", "未见过的字 🦊", "naïve \x00 \u200b"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_its_special_ids_are_the_models():
    tokenizer, model = tiny_tokenizer(TEXTS, 400), tiny_model(vocab_size=400)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_dialogues_ids_are_a_prefix_of_the_longer_dialogues_ids():
    tokenizer = tiny_tokenizer(TEXTS, 400)
    whole = tokenizer.apply_chat_template(DIALOGUE, return_dict=False)
    for count in (2, 4):
        part = tokenizer.apply_chat_template(
            DIALOGUE[:count], add_generation_prompt=True, return_dict=False
        )
        assert whole[: len(part)] == part


def test_the_seed_decides_the_weights_and_global_random_state_is_kept():
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    first = tiny_model(vocab_size=300, seed=1)
    assert torch.equal(torch.rand(2), expected)
    again, other = (tiny_model(vocab_size=300, seed=seed) for seed in (1, 2))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_it_has_less_than_a_million_parameters():
    assert sum(p.numel() for p in tiny_model(vocab_size=512).parameters()) < 1_000_000


def test_it_is_built_once_and_again_when_the_text_changes(tmp_path, bundled):
    first = build_tiny(tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert build_tiny(tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    bundled("Other text altogether.")
    assert build_tiny(tmp_path) != first
    assert not list(tmp_path.glob("*partial*"))


def test_the_same_text_gives_the_same_files(tmp_path, bundled):
    one, two = build_tiny(tmp_path / "a"), build_tiny(tmp_path / "b")
    assert one.name == two.name
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_the_short_name_loads_as_policy_and_reward_model(tmp_path, bundled, monkeypatch):
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path))
    folder = resolve("tiny")
    tokenizer = load_tokenizer("tiny")
    policy = load_policy("tiny")
    assert folder == str(build_tiny(tmp_path))
    assert policy.config.pad_token_id == tokenizer.pad_token_id
    ids = torch.tensor([tokenizer.encode("How do I boil an egg?")])
    assert load_reward_model("tiny", seed=0).values(ids).shape == ids.shape


def test_the_bundled_preferences_make_the_default(tmp_path):
    folder = build_tiny(tmp_path)
    assert len(load_tokenizer(str(folder))) == 512
