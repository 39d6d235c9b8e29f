import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppomax.data.batching import derived_seed
from ppomax.rollout import sampling
from ppomax.rollout.sampling import SamplingParams, gumbel, penalise, sample

DRAWS = 100_000
PEAKED = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0, 3.0, 0.2])


def seeds_of(count, name="draws"):
    """63-bit seeds, as a run makes them."""
    generator = np.random.default_rng(derived_seed(name))
    return torch.from_numpy(generator.integers(0, 2**63, count, dtype=np.int64))


def draws_of(logits, params, generated=None, count=DRAWS, batch=10_000, name="draws"):
    """Many draws from one distribution: seeds and steps both vary."""
    tokens, logprobs = [], []
    seeds = seeds_of(count // batch * batch, name).view(-1, batch)
    for number, row in enumerate(seeds):
        steps = torch.arange(batch) % 50 + number
        past = None if generated is None else generated[None].expand(batch, -1)
        draw = sample(logits[None].expand(batch, -1).contiguous(), row, steps, params, past)
        tokens.append(draw.tokens)
        logprobs.append(draw.logprobs)
    return torch.cat(tokens), torch.cat(logprobs)


def softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    chance = np.exp(logits - logits.max())
    return chance / chance.sum()


def reference(logits, params, generated=()):
    """The distribution by its definition, in float64: penalty, temperature, top-k, top-p, min-p."""
    logits = np.array(logits, dtype=np.float64)
    if params.repetition_penalty is not None:
        for token in {int(t) for t in generated if t >= 0}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    logits = logits / params.temperature
    order = np.argsort(-logits, kind="stable")
    keep = np.ones(len(logits), dtype=bool)
    if params.top_k is not None:
        keep[order[params.top_k :]] = False
    if params.min_p is not None:
        keep &= softmax(logits) >= params.min_p * softmax(logits).max()
    if params.top_p is not None:
        chance = softmax(logits)
        if params.top_k is not None:
            chance[order[params.top_k :]] = 0
            chance /= chance.sum()
        before = np.cumsum(chance[order]) - chance[order]
        keep[order[before >= params.top_p]] = False
    keep[order[0]] = True
    chance = np.where(keep, softmax(logits), 0)
    return chance / chance.sum()


def fits(tokens, chance):
    """The chi-square p-value of the counts; tokens that are impossible must be absent."""
    counts = np.bincount(tokens.numpy(), minlength=len(chance))
    assert counts[chance == 0].sum() == 0, "a token that cannot be drawn was drawn"
    expected = chance * counts.sum()
    rare = expected < 10
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 10:
        seen, wanted = seen[:-1], wanted[:-1]
        wanted = wanted * seen.sum() / wanted.sum()
    return stats.chisquare(seen, wanted).pvalue if len(seen) > 1 else 1.0


PAST = torch.tensor([10, 0, 0, 7, -1])

CASES = {
    "temperature 1": SamplingParams(),
    "temperature 0.6": SamplingParams(temperature=0.6),
    "temperature 1.7": SamplingParams(temperature=1.7),
    "top-k 4": SamplingParams(top_k=4),
    "top-k 1": SamplingParams(top_k=1),
    "top-k over all": SamplingParams(top_k=500),
    "top-p 0.9": SamplingParams(top_p=0.9),
    "top-p 0.3": SamplingParams(top_p=0.3),
    "top-p 0.01": SamplingParams(top_p=0.01),
    "top-p 1": SamplingParams(top_p=1.0),
    "min-p 0.1": SamplingParams(min_p=0.1),
    "min-p 0": SamplingParams(min_p=0.0),
    "penalty 1.5": SamplingParams(repetition_penalty=1.5),
    "penalty 0.7": SamplingParams(repetition_penalty=0.7),
    "the paper's": SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
}


# --- draws follow the distribution


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    params = CASES[name]
    tokens, logprobs = draws_of(PEAKED, params, PAST)
    chance = reference(PEAKED, params, PAST)
    assert fits(tokens, chance) > 1e-3
    torch.testing.assert_close(
        logprobs.double(), torch.from_numpy(np.log(chance[tokens.numpy()])), rtol=0, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("candidates", [1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_draws_follow_the_distribution_where_most_of_it_is_tail(
    monkeypatch, candidates, temperature
):
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    flat = PEAKED / 10
    params = SamplingParams(temperature=temperature)
    tokens, logprobs = draws_of(flat, params, count=10_000, batch=5_000)
    chance = reference(flat, params)
    assert fits(tokens, chance) > 1e-3
    inside = set(flat.topk(candidates).indices.tolist())
    assert any(token not in inside for token in tokens.tolist())
    torch.testing.assert_close(
        logprobs.double(), torch.from_numpy(np.log(chance[tokens.numpy()])), rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_draws_from_a_flat_vocabulary_wider_than_the_candidates_are_exact():
    logits = torch.linspace(-0.5, 0.5, sampling.CANDIDATES * 2 + 88)
    tokens, _ = draws_of(logits, SamplingParams(), count=20_000, batch=5_000)
    assert fits(tokens, reference(logits, SamplingParams())) > 1e-3


def test_a_tail_that_weighs_nothing_is_never_drawn(monkeypatch):
    monkeypatch.setattr(sampling, "CANDIDATES", 2)
    logits = torch.tensor([1.0, 0.0, -80.0, -80.0])
    tokens, _ = draws_of(logits, SamplingParams(), count=50_000)
    assert set(tokens.tolist()) == {0, 1}


def test_the_tail_is_as_likely_however_large_the_logits(monkeypatch):
    monkeypatch.setattr(sampling, "CANDIDATES", 2)
    # fp32 holds these exactly, so that only the sampler's own arithmetic can matter
    logits = torch.tensor([1.0, 0.0, -40.0, -40.0, -41.0])
    shifted = logits + 8192.0
    assert torch.equal(shifted - 8192.0, logits)
    tokens, _ = draws_of(shifted, SamplingParams(), count=50_000)
    assert set(tokens.tolist()) == {0, 1}


@pytest.mark.parametrize("name", ["top-p 0.9", "min-p 0.1", "the paper's"])
def test_a_nucleus_wider_than_the_candidates_falls_back_exactly(monkeypatch, name):
    params = CASES[name]
    wide = draws_of(PEAKED / 4, params, PAST, count=20_000)
    monkeypatch.setattr(sampling, "CANDIDATES", 3)
    narrow = draws_of(PEAKED / 4, params, PAST, count=20_000)
    assert torch.equal(wide[0], narrow[0])
    torch.testing.assert_close(wide[1], narrow[1], rtol=0, atol=1e-6)
    assert len(set(narrow[0].tolist())) > 3


@pytest.mark.parametrize("candidates", [1, 3, 5, 12])
def test_a_nucleus_within_the_candidates_is_the_same_for_any_number_of_them(
    monkeypatch, candidates
):
    params = SamplingParams(top_p=0.5)
    before = draws_of(PEAKED, params, count=10_000)
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    after = draws_of(PEAKED, params, count=10_000)
    assert torch.equal(before[0], after[0])


@pytest.mark.slow
def test_the_default_number_of_candidates_holds_a_wide_nucleus_exactly():
    logits = torch.linspace(0, 2, 600)
    params = SamplingParams(top_p=0.8)
    tokens, _ = draws_of(logits, params, count=50_000, batch=5_000)
    chance = reference(logits, params)
    assert (chance > 0).sum() > sampling.CANDIDATES
    assert fits(tokens, chance) > 1e-3


@pytest.mark.parametrize("vocab", [4096, 16_384, 50_000, 50_003])
@pytest.mark.parametrize("count", [1, 8, 256])
def test_the_most_likely_tokens_are_those_of_a_full_sort(vocab, count):
    generator = torch.Generator().manual_seed(vocab + count)
    logits = torch.randperm(vocab * 3, generator=generator).float().view(3, vocab)  # no two alike
    values, ids = sampling.most_likely(logits, count)
    wanted = logits.sort(1, descending=True)
    assert torch.equal(values, wanted.values[:, :count])
    assert torch.equal(ids, wanted.indices[:, :count])


@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.8, "min_p": 0.1}])
def test_a_nucleus_is_widened_until_it_fits_and_then_drawn_as_from_the_whole(monkeypatch, params):
    # widths from a few tokens to nearly all 8192: each row stops at a step of its own
    spread = torch.tensor([12.0, 6.0, 3.0, 1.5, 0.7, 0.1])[:, None]
    logits = torch.randn(6, 8192, generator=torch.Generator().manual_seed(0)) * spread
    logits, seeds = logits.repeat(20, 1), seeds_of(120)
    steps, params = torch.arange(120), SamplingParams(**params)
    monkeypatch.setattr(sampling, "CANDIDATES", 16)
    stepwise = sample(logits, seeds, steps, params)
    monkeypatch.setattr(sampling, "CANDIDATES", 8192)
    whole = sample(logits, seeds, steps, params)
    assert torch.equal(stepwise.tokens, whole.tokens)
    torch.testing.assert_close(stepwise.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def test_top_k_may_ask_for_more_than_the_candidates(monkeypatch):
    monkeypatch.setattr(sampling, "CANDIDATES", 3)
    params = SamplingParams(top_k=8)
    tokens, _ = draws_of(PEAKED, params, count=20_000)
    assert fits(tokens, reference(PEAKED, params)) > 1e-3


def test_equally_likely_tokens_at_the_edge_leave_exactly_top_k():
    tokens, logprobs = draws_of(torch.zeros(20), SamplingParams(top_k=4), count=10_000)
    assert len(set(tokens.tolist())) == 4
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(4)))


@settings(derandomize=True, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.none() | st.integers(1, 40),
    st.none() | st.floats(0.05, 0.99),
    st.none() | st.floats(0.01, 0.5),
)
def test_the_support_and_log_probs_are_those_of_transformers_own_warpers(
    seed, temperature, top_k, top_p, min_p
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 30, generator=generator) * 2
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = logits / temperature
    for value, warper in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper)):
        scores = scores if value is None else warper(value)(None, scores)
    scores = scores if min_p is None else MinPLogitsWarper(min_p)(None, scores)
    wanted = torch.log_softmax(scores, 1)[0]
    many = logits.expand(300, -1).contiguous()
    draw = sample(many, seeds_of(300), torch.zeros(300).long(), params)
    assert bool(torch.isfinite(wanted[draw.tokens]).all())
    torch.testing.assert_close(draw.logprobs, wanted[draw.tokens], rtol=0, atol=1e-5)


# --- greedy


def test_temperature_zero_takes_the_most_likely_token_whatever_the_seed():
    logits = torch.stack([PEAKED, PEAKED.flip(0)]).repeat(50, 1)
    draw = sample(logits, seeds_of(100), torch.arange(100), SamplingParams(temperature=0))
    assert draw.tokens.tolist() == [10, 1] * 50
    wanted = float(torch.log_softmax(PEAKED, 0)[10])
    assert draw.logprobs.tolist() == pytest.approx([wanted] * 100, abs=1e-6)


def test_greedy_takes_the_larger_of_two_logits_that_nearly_tie():
    logits = torch.zeros(1, 50_000)
    logits[0, 3] = 1.0
    logits[0, 7] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    draw = sample(logits, seeds_of(1), torch.zeros(1).long(), SamplingParams(temperature=0))
    assert draw.tokens.tolist() == [7]


def test_the_repetition_penalty_counts_in_greedy_too():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    params = SamplingParams(temperature=0, repetition_penalty=1.2)
    past = torch.tensor([[0]])
    draw = sample(logits, seeds_of(1), torch.ones(1).long(), params, past)
    assert draw.tokens.tolist() == [1]  # 2.0 / 1.2 = 1.67 < 1.9
    wanted = torch.log_softmax(torch.tensor([2.0 / 1.2, 1.9, -1.0]), 0)[1]
    assert float(draw.logprobs) == pytest.approx(float(wanted), abs=1e-6)


# --- noise


def batch_of(count, vocab, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=generator) * scale
    past = torch.randint(-1, vocab, (count, 6), generator=generator)
    steps = torch.randint(0, 40, (count,), generator=generator)
    return logits, seeds_of(count, str(seed)), steps, past


PATHS = {
    "plain": (SamplingParams(), 30),
    "plain with a tail": (SamplingParams(temperature=2.0), 600),
    "top-k": (SamplingParams(top_k=7), 600),
    "top-p": (SamplingParams(top_p=0.9), 600),
    "min-p": (SamplingParams(min_p=0.01), 600),
    "paper": (CASES["the paper's"], 600),
    "greedy": (SamplingParams(temperature=0), 30),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_rows_draw_is_the_same_alone_and_in_any_batch_and_order(name):
    params, vocab = PATHS[name]
    logits, seeds, steps, past = batch_of(24, vocab)
    logits[::3] *= 0.02  # some rows are flat: they use the tail or widen the nucleus
    together = sample(logits, seeds, steps, params, past)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    turned = sample(logits[order], seeds[order], steps[order], params, past[order])
    assert torch.equal(turned.tokens, together.tokens[order])
    torch.testing.assert_close(turned.logprobs, together.logprobs[order], rtol=0, atol=1e-6)
    for row in range(24):
        one = slice(row, row + 1)
        alone = sample(logits[one], seeds[one], steps[one], params, past[one])
        assert int(alone.tokens) == int(together.tokens[row])
        assert float(alone.logprobs) == pytest.approx(float(together.logprobs[row]), abs=1e-6)


@pytest.mark.slow
def test_a_rows_draw_is_the_same_beside_a_wider_nucleus_even_where_tokens_tie():
    logits = torch.zeros(2, 400)
    places = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:40]
    logits[0, places] = 20.0  # forty equal ones, of which top-p keeps 32; bf16 logits tie like this
    seeds = seeds_of(2)
    params = SamplingParams(top_p=0.8)
    for step in range(100):
        steps = torch.full((2,), step)
        alone = sample(logits[:1], seeds[:1], steps[:1], params)
        beside = sample(logits, seeds, steps, params)
        assert int(alone.tokens) == int(beside.tokens[0])


def test_different_seeds_and_steps_give_different_draws():
    logits = torch.zeros(1, 1000).expand(200, -1).contiguous()
    still = torch.zeros(200).long()
    by_seed = sample(logits, seeds_of(200), still, SamplingParams()).tokens
    assert len(set(by_seed.tolist())) > 150
    one = seeds_of(1).expand(200).contiguous()
    by_step = sample(logits, one, torch.arange(200), SamplingParams()).tokens
    assert len(set(by_step.tolist())) > 150
    same = sample(logits, one, still, SamplingParams()).tokens
    assert len(set(same.tolist())) == 1


def test_neighbouring_seeds_and_steps_are_independent():
    # a small seed for each reply would be a natural mistake of a caller: even those must not align
    seeds = torch.arange(200).repeat_interleave(200)
    steps = torch.arange(200).repeat(200)
    logits = torch.zeros(1, 4).expand(40_000, -1).contiguous()
    tokens = sample(logits, seeds, steps, SamplingParams()).tokens.view(200, 200)
    for first, second in (
        (tokens[:-1], tokens[1:]),
        (tokens[:, :-1], tokens[:, 1:]),
        (tokens[1:, :-1], tokens[:-1, 1:]),
    ):
        table = np.zeros((4, 4))
        np.add.at(table, (first.flatten().numpy(), second.flatten().numpy()), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_sampling_neither_reads_nor_moves_the_global_random_state():
    logits, seeds, steps, past = batch_of(8, 600)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = sample(logits, seeds, steps, SamplingParams(), past)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sample(logits, seeds, steps, SamplingParams(), past).tokens, first.tokens)


def test_sampling_leaves_its_arguments_alone():
    logits, seeds, steps, past = batch_of(8, 600)
    copies = [x.clone() for x in (logits, seeds, steps, past)]
    for params, _ in PATHS.values():
        sample(logits, seeds, steps, params, past)
    for now, before in zip((logits, seeds, steps, past), copies, strict=True):
        assert torch.equal(now, before)


def test_the_noise_is_standard_gumbel():
    noise = gumbel(seeds_of(500), torch.arange(500) % 7, torch.arange(400).expand(500, -1))
    assert noise.dtype == torch.float64
    flat = noise.flatten().numpy()
    # mean 0.5772 and variance pi^2 / 6; 2e5 draws: standard errors 0.0029 and 0.0077
    assert flat.mean() == pytest.approx(0.5772156649, abs=0.01)
    assert flat.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert stats.kstest(flat, "gumbel_r").pvalue > 1e-3
    assert np.isfinite(flat).all()


def test_the_noise_depends_on_seed_step_id_and_stream_and_on_nothing_else():
    seeds, steps, ids = seeds_of(3), torch.tensor([0, 1, 2]), torch.tensor([[0, 5, -1]] * 3)
    noise = gumbel(seeds, steps, ids)
    assert noise.unique().numel() == 9
    assert torch.equal(noise, gumbel(seeds, steps, ids))
    assert torch.equal(noise[1:2, 1:2], gumbel(seeds[1:2], steps[1:2], ids[1:2, 1:2]))
    for other in (
        gumbel(seeds + 1, steps, ids),
        gumbel(seeds, steps + 1, ids),
        gumbel(seeds, steps, ids + 1),
        gumbel(seeds, steps, ids, stream=1),
    ):
        assert bool((noise != other).all())


def test_noise_of_neighbouring_ids_steps_and_seeds_is_uncorrelated():
    seeds = torch.arange(300)
    ids = torch.arange(300).expand(300, -1)
    noise = gumbel(seeds, torch.zeros(300).long(), ids)
    later = gumbel(seeds, torch.ones(300).long(), ids)
    for a, b in (
        (noise[:, :-1], noise[:, 1:]),
        (noise[:-1], noise[1:]),
        (noise, later),
        (noise[1:], later[:-1]),
    ):
        corr = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(corr) < 0.015  # 4.5 standard errors of 9e4 pairs


def test_the_noise_is_the_recorded_one():
    # SplitMix64's finaliser, worked in Python's own unbounded integers
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    def noise(seed, step, token, stream):
        state = mix((seed + 0x9E3779B97F4A7C15 * (step * 2 + stream + 1)) & mask)
        bits = mix(state ^ mix((token * 0xD1342543DE82EF95 + 1) & mask))
        return -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))

    seeds = [0, 1, 2**63 - 1, derived_seed("a")]
    for seed in seeds:
        for step, token, stream in ((0, 0, 0), (3, 77, 0), (10**6, 151_000, 1), (0, -1, 0)):
            got = gumbel(
                torch.tensor([seed]), torch.tensor([step]), torch.tensor([[token]]), stream
            )
            assert float(got) == pytest.approx(noise(seed, step, token, stream), rel=1e-12)


# --- the repetition penalty


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_tokens_seen():
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0, -3.0], [2.0, -2.0, 0.0, 3.0, -3.0]])
    past = torch.tensor([[0, 1, 2, 0], [4, -1, -1, -1]])
    found = penalise(logits, past, 1.5)
    assert found.tolist() == [
        pytest.approx([2 / 1.5, -3.0, 0.0, 3.0, -3.0]),  # 0 twice, still once divided
        pytest.approx([2.0, -2.0, 0.0, 3.0, -4.5]),
    ]
    assert logits.tolist()[0] == [2.0, -2.0, 0.0, 3.0, -3.0]


def test_a_missing_token_marks_nothing_not_even_the_last_id():
    logits = torch.ones(1, 4)
    assert torch.equal(penalise(logits, torch.tensor([[-1, -1]]), 2.0), logits)
    assert torch.equal(penalise(logits, torch.zeros(1, 0, dtype=torch.long), 2.0), logits)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.5, 2.0))
def test_the_penalty_is_transformers_own(seed, penalty):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 12, generator=generator) * 3
    past = torch.randint(0, 12, (3, 5), generator=generator)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(past, logits.clone())
    torch.testing.assert_close(penalise(logits, past, penalty), wanted)


def test_without_the_setting_the_past_is_not_read():
    logits, seeds, steps, past = batch_of(8, 30)
    a = sample(logits, seeds, steps, SamplingParams(), past)
    b = sample(logits, seeds, steps, SamplingParams())
    assert torch.equal(a.tokens, b.tokens)


# --- settings


def test_plain_means_temperature_alone():
    assert SamplingParams().is_plain
    assert SamplingParams(temperature=0.5, max_new_tokens=3, stop=["x"]).is_plain
    assert not SamplingParams(temperature=0).is_plain
    for trick in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        assert not SamplingParams(**trick).is_plain


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
    ],
)
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        SamplingParams(**wrong)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValidationError):
        SamplingParams(stop=[""])


def test_a_very_low_temperature_draws_the_most_likely_token():
    tokens, logprobs = draws_of(PEAKED, SamplingParams(temperature=1e-4), count=10_000)
    assert set(tokens.tolist()) == {10}
    assert bool((logprobs == 0).all())
