import json
import shutil

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from ppomax.errors import ModelError
from ppomax.models import load as module
from ppomax.models.heads import ScalarModel
from ppomax.models.load import (
    ensure_pad,
    fit_vocabulary,
    load_policy,
    load_reward_model,
    load_tokenizer,
    load_value_model,
)
from ppomax.models.names import resolve
from ppomax.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ["the sea is wide and the ship is small", "rice, water, salt"] * 20
IDS = torch.tensor([[5, 9, 20, 31, 7, 8], [40, 3, 12, 6, 90, 11]])


def save(folder, model=None, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer(TEXTS, 300)
    model = model or tiny_model(vocab_size=len(tokenizer), hidden_size=32, intermediate=48)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def edit(path, **values):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | values))


# --- names


def test_a_model_folder_resolves_to_itself_and_a_hub_id_passes_through(tmp_path):
    assert resolve(save(tmp_path / "m")) == str(tmp_path / "m")
    assert resolve("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    ("lost", "named"),
    [("config.json", "config.json"), ("tokenizer", "tokenizer"), ("model.safetensors", "safeten")],
)
def test_a_folder_that_lacks_a_part_is_refused_by_the_name_of_the_part(tmp_path, lost, named):
    save(tmp_path / "m")
    for path in (tmp_path / "m").glob(f"{lost}*"):
        path.unlink()
    with pytest.raises(ModelError, match=named):
        load_policy(str(tmp_path / "m"))


def test_pickled_weights_are_never_read(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(tiny_model(vocab_size=300).state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_policy(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "two words", "a/b/c", ""])
def test_a_name_that_can_be_nothing_is_refused(name):
    with pytest.raises(ModelError, match="no such folder"):
        load_policy(name)


def test_a_near_miss_of_a_short_name_is_answered_with_it():
    with pytest.raises(ModelError, match="smollm2-135m"):
        resolve("smollm2-135")


def test_a_run_directory_is_answered_with_its_export(tmp_path):
    save(tmp_path / "run" / "export")
    with pytest.raises(ModelError, match=r"did you mean .*export"):
        resolve(str(tmp_path / "run"))


def test_the_directory_of_a_whole_run_is_answered_with_its_policy(tmp_path):
    save(tmp_path / "run" / "ppo" / "export")
    with pytest.raises(ModelError, match=r"did you mean .*run/ppo/export"):
        resolve(str(tmp_path / "run"))


def test_an_adapter_folder_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        resolve(str(tmp_path))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand more\nlines")

    monkeypatch.setattr(module.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError) as caught:
        load_policy("some/model")
    assert "\n" not in str(caught.value)
    assert "couldn't connect" in str(caught.value)


def test_code_shipped_with_a_model_does_not_run_unless_asked(tmp_path):
    save(tmp_path / "m")
    mark = tmp_path / "ran"
    (tmp_path / "m" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    edit(tmp_path / "m" / "config.json", auto_map=auto, model_type="evil")
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_policy(str(tmp_path / "m"))
    assert not mark.exists()


# --- pad ids


def test_a_pad_of_its_own_is_kept():
    tokenizer = tiny_tokenizer(TEXTS, 300)
    before = tokenizer.pad_token_id
    assert ensure_pad(tokenizer) == before
    assert len(tokenizer) == 300 or len(tokenizer) == len(tokenizer.get_vocab())


def test_pad_equal_to_eos_is_replaced_by_the_token_reserved_for_it():
    tokenizer = tiny_tokenizer(TEXTS, 300)
    reserved = tokenizer.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token
    assert ensure_pad(tokenizer) == reserved


def test_a_pad_that_the_generation_config_ends_with_is_replaced(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    tokenizer.pad_token = "<|endoftext|>"
    folder = save(tmp_path / "m", tokenizer=tokenizer)
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert loaded.pad_token == "<|pad|>"
    assert load_policy(folder).generation_config.eos_token_id == [0, 2]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_answer_ends_with_the_templates_end_of_turn_whatever_eos_and_pad_say(tmp_path):
    tokenizer = plain_tokenizer("<|endoftext|>", "<|im_start|>", "<|spare|>")
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|im_end|>"  # as Qwen 2.5's base
    tokenizer.chat_template = CHATML
    model = tiny_model(vocab_size=len(tokenizer), hidden_size=32, intermediate=48)
    folder = save(tmp_path / "m", model, tokenizer)
    loaded = load_tokenizer(folder)
    turn, text = loaded.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert loaded.pad_token == "<|spare|>", "a pad that ends a text hides the token that is scored"
    assert {turn, text} <= set(load_policy(folder).generation_config.eos_token_id)


def test_an_unused_special_token_is_taken_before_the_vocabulary_grows():
    tokenizer = plain_tokenizer("<|im_start|>", "<repo>", "<empty>")
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    ensure_pad(tokenizer)
    assert tokenizer.pad_token == "<empty>", "the last that the template does not use"
    assert len(tokenizer) == size


def test_with_nothing_unused_a_token_is_added_and_the_policy_grows_for_it(tmp_path):
    tokenizer = plain_tokenizer()
    size = len(tokenizer)
    model = tiny_model(vocab_size=size, hidden_size=32, intermediate=48, tied=False)
    folder = save(tmp_path / "m", model, tokenizer)
    loaded = load_tokenizer(folder)
    policy = load_policy(folder)
    assert loaded.pad_token_id == size
    assert policy.config.vocab_size == size + 1
    assert policy.config.pad_token_id == size
    assert torch.equal(policy(IDS).logits[..., :size], model(IDS).logits)
    weight = model.lm_head.weight
    assert torch.allclose(policy.lm_head.weight[size], sum(weight) / size, atol=1e-6)
    again = load_policy(folder)
    same = zip(policy.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def plain_tokenizer(*extra):
    """Ends with <|im_end|>, has no pad, and the special tokens named."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|im_end|>", *extra],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ '<|im_start|>' + messages[0]['content'] + '<|im_end|>' }}"
    return tokenizer


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = plain_tokenizer()
    tokenizer.eos_token = None
    folder = save(tmp_path / "m", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="eos"):
        load_tokenizer(folder)


def test_a_vocabulary_with_room_is_not_resized():
    model = tiny_model(vocab_size=400)
    fit_vocabulary(model, 390)
    assert model.config.vocab_size == 400


# --- policies


def test_a_policy_has_no_dropout_even_in_training_mode(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        attn_pdrop=0.5,
    )
    gpt2 = save(tmp_path / "gpt2", GPT2LMHeadModel(config), tokenizer)
    llama = save(tmp_path / "llama", tokenizer=tokenizer)
    edit(tmp_path / "llama" / "config.json", attention_dropout=0.5)
    for folder in (gpt2, llama):
        for model in (load_policy(folder), load_reward_model(folder).backbone):
            quiet, training = model(IDS)[0], model.train()(IDS)[0]
            assert torch.equal(quiet, training)


def test_a_policy_brings_no_sampling_settings_along(tmp_path):
    folder = save(tmp_path / "m")
    GenerationConfig(
        eos_token_id=2, repetition_penalty=1.3, temperature=0.2, do_sample=True, max_new_tokens=5
    ).save_pretrained(folder)
    kept = load_policy(folder).generation_config.to_diff_dict()
    kept.pop("transformers_version", None)
    assert kept == {"eos_token_id": [2], "pad_token_id": 3}


def test_loading_gives_the_saved_weights_and_leaves_random_state_alone(tmp_path):
    source = tiny_model(vocab_size=300, hidden_size=32, intermediate=48)
    folder = save(tmp_path / "m", source)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    policy = load_policy(folder)
    load_reward_model(folder)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(policy(IDS).logits, source(IDS).logits)
    assert not policy.training
    assert load_policy(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_are_not_in_the_file_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_policy(folder)


def test_logits_that_are_not_hidden_times_weight_are_refused(tmp_path):
    common = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    scaled = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=4.0))
    capped = Gemma2ForCausalLM(Gemma2Config(**common, head_dim=8))
    for name, model in (("scaled", scaled), ("capped", capped)):
        folder = save(tmp_path / name, model)
        with pytest.raises(ModelError, match="scales, caps or shifts"):
            load_policy(folder, attn_implementation="eager")


def test_an_attention_the_model_lacks_is_answered_with_one_it_has(tmp_path):
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
    )
    folder = save(tmp_path / "m", Gemma2ForCausalLM(config))
    with pytest.raises(ModelError, match="attn_implementation"):
        load_policy(folder, attn_implementation="flash_attention_9")


def test_an_architecture_without_our_attention_is_refused_in_words_that_help(tmp_path):
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)
    folder = save(tmp_path / "m", BloomForCausalLM(config))
    with pytest.raises(ModelError, match=r"attention in another way only .* use another arch"):
        load_policy(folder)


# --- reward and value models


def test_a_fresh_reward_model_has_the_policys_backbone_and_a_seeded_head(tmp_path):
    folder = save(tmp_path / "m")
    first, again, other = (load_reward_model(folder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.values(IDS), again.values(IDS))
    assert not torch.equal(first.score.weight, other.score.weight)
    read = load_policy(folder).model(IDS, use_cache=False).last_hidden_state
    assert torch.equal(first.hidden(IDS), read)


def test_a_saved_reward_model_comes_back_as_it_was(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    scalar = ScalarModel.from_causal_lm(tiny_model(vocab_size=len(tokenizer), tied=False), seed=4)
    scalar.save(tmp_path / "rm", tokenizer)
    reward = load_reward_model(str(tmp_path / "rm"), init_from_lm=False)
    torch.testing.assert_close(reward.values(IDS), scalar.values(IDS))
    assert reward.lm_head is not None
    critic = load_value_model(str(tmp_path / "rm"))
    assert torch.equal(critic.values(IDS), reward.values(IDS))
    assert critic.lm_head is None


def test_each_kind_is_refused_where_the_other_is_wanted(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    lm = save(tmp_path / "m", tokenizer=tokenizer)
    model = tiny_model(vocab_size=len(tokenizer))
    ScalarModel.from_causal_lm(model, seed=0).save(tmp_path / "rm", tokenizer)
    with pytest.raises(ModelError, match="is a reward model; a policy needs"):
        load_policy(str(tmp_path / "rm"))
    with pytest.raises(ModelError, match="is a reward model; a language model is needed"):
        load_reward_model(str(tmp_path / "rm"), init_from_lm=True)
    with pytest.raises(ModelError, match="is a language model; a reward model is needed"):
        load_reward_model(lm, init_from_lm=False)


def test_a_classifier_with_several_outputs_is_no_reward_model(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    model = tiny_model(vocab_size=len(tokenizer))
    ScalarModel.from_causal_lm(model, seed=0).save(tmp_path / "rm", tokenizer)
    edit(tmp_path / "rm" / "config.json", id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1})
    with pytest.raises(ModelError, match="2 outputs"):
        load_reward_model(str(tmp_path / "rm"))


def test_a_reward_model_whose_pad_was_its_eos_gets_one_of_its_own(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    model = tiny_model(vocab_size=len(tokenizer))
    ScalarModel.from_causal_lm(model, seed=0).save(tmp_path / "rm", tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "rm")
    edit(tmp_path / "rm" / "config.json", pad_token_id=tokenizer.eos_token_id)
    reward = load_reward_model(str(tmp_path / "rm"))
    assert reward.config.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")


def test_a_folder_can_be_moved(tmp_path):
    save(tmp_path / "m")
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")
    assert load_policy(str(tmp_path / "elsewhere"))(IDS).logits.shape[:2] == IDS.shape
