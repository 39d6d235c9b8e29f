import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ppomax.errors import ModelError
from ppomax.models.heads import ScalarModel, hidden_states, output_weight, read_scores
from ppomax.models.load import load_reward_model
from ppomax.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(["the sea is wide and the ship is small", "rice, water, salt"] * 20, 300)
SIZE, PAD, EOS = len(TOKENIZER), TOKENIZER.pad_token_id, TOKENIZER.eos_token_id


def model(**kwargs):
    return tiny_model(vocab_size=SIZE, hidden_size=32, intermediate=48, **kwargs)


def batch(rows):
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


ROWS = [
    [5, 9, 20, EOS],
    [40, 33, 12, 6, 90, 11, 250],  # cut off: no eos
    [1, 77, EOS, 30, 1, 8, 9, 61, EOS],  # eos inside
    [61],
]


def test_hidden_states_times_the_unembedding_are_the_logits():
    for tied in (True, False):
        policy = model(tied=tied)
        ids, _ = batch(ROWS)
        logits = hidden_states(policy, ids) @ output_weight(policy).T
        assert torch.allclose(logits, policy(ids).logits, atol=1e-6)


def test_a_score_alone_equals_the_score_in_a_padded_batch():
    scalar = ScalarModel.from_causal_lm(model(), seed=0)
    ids, lengths = batch(ROWS)
    together = scalar.scores(ids, lengths)
    alone = torch.cat([scalar.scores(*batch([row])) for row in ROWS])
    assert (together - alone).abs().max() < 1e-5
    assert together.unique().numel() == len(ROWS)


def test_garbage_in_padding_changes_no_score():
    scalar = ScalarModel.from_causal_lm(model(), seed=0)
    ids, lengths = batch(ROWS)
    garbage = ids.clone()
    for i, length in enumerate(lengths):
        garbage[i, length:] = EOS
    assert torch.equal(scalar.scores(ids, lengths), scalar.scores(garbage, lengths))


def test_a_score_is_read_at_the_last_token():
    values = torch.arange(12.0).reshape(3, 4)
    assert read_scores(values, torch.tensor([1, 4, 2])).tolist() == [0.0, 7.0, 9.0]


def test_values_are_the_head_applied_to_the_hidden_states():
    scalar = ScalarModel.from_causal_lm(model(), seed=0)
    ids, _ = batch(ROWS)
    weight = scalar.score.weight[0]
    expected = sum(scalar.hidden(ids)[..., i] * weight[i] for i in range(32))
    assert torch.allclose(scalar.values(ids), expected, atol=1e-5)
    assert torch.equal(scalar(ids).hidden, scalar.hidden(ids).flatten(0, 1))


def test_values_are_fp32_under_bf16_autocast():
    scalar = ScalarModel.from_causal_lm(model(), seed=0)
    ids, lengths = batch(ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = scalar(ids)
    expected = (output.hidden.float() @ scalar.score.weight[0]).view_as(ids)
    assert output.values.dtype == torch.float32
    assert torch.allclose(output.values, expected, atol=1e-6)
    assert read_scores(output.values, lengths).dtype == torch.float32


def test_a_fresh_head_is_small_and_decided_by_its_seed():
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    first = ScalarModel.from_causal_lm(tiny_model(vocab_size=64, hidden_size=1024), seed=1)
    assert torch.equal(torch.rand(2), expected), "global random state was disturbed"
    again, other = (
        ScalarModel.from_causal_lm(tiny_model(vocab_size=64, hidden_size=1024), seed=seed)
        for seed in (1, 2)
    )
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_scores_the_same_in_plain_transformers(tmp_path, tied):
    scalar = ScalarModel.from_causal_lm(model(tied=tied), seed=0)
    scalar.config.pad_token_id = EOS  # as many published models have it
    scalar.save(tmp_path / "rm", TOKENIZER)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    ids, lengths = batch(ROWS)
    scores = scalar.scores(ids, lengths)
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == PAD
    assert (plain(ids).logits[:, 0] - scores).abs().max() < 1e-5
    alone = torch.cat([plain(batch([row])[0]).logits[:, 0] for row in ROWS])
    assert (alone - scores).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_goes_on_with_its_language_model_head(tmp_path, tied):
    scalar = ScalarModel.from_causal_lm(model(tied=tied), seed=0)
    scalar.save(tmp_path / "rm", TOKENIZER)
    again = load_reward_model(str(tmp_path / "rm"))
    assert (tmp_path / "rm" / "lm_head.safetensors").exists() != tied
    assert torch.equal(again.output_weight(), scalar.output_weight())
    assert torch.equal(output_weight(again), again.output_weight())
    ids, lengths = batch(ROWS)
    torch.testing.assert_close(again.scores(ids, lengths), scalar.scores(ids, lengths))


def test_saving_leaves_the_model_as_it_was(tmp_path):
    scalar = ScalarModel.from_causal_lm(model(), seed=0)
    names = list(scalar.state_dict())
    config = scalar.config.to_dict()
    scalar.save(tmp_path / "rm", TOKENIZER)
    assert list(scalar.state_dict()) == names
    kept = scalar.config.to_dict()
    kept.pop("architectures"), config.pop("architectures")
    assert kept == config


def test_a_lost_language_model_head_is_named(tmp_path):
    scalar = ScalarModel.from_causal_lm(model(tied=False), seed=0)
    scalar.save(tmp_path / "rm", TOKENIZER)
    (tmp_path / "rm" / "lm_head.safetensors").unlink()
    again = load_reward_model(str(tmp_path / "rm"))
    with pytest.raises(ModelError, match="imitation"):
        again.output_weight()


def test_a_classifier_with_another_head_is_refused():
    from transformers import LlamaForSequenceClassification

    config = model().config
    config.num_labels = 3
    with pytest.raises(ModelError, match="one output"):
        ScalarModel.from_classifier(LlamaForSequenceClassification(config))
