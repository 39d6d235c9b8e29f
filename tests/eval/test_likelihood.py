"""Log-likelihoods of continuations: those of texts read one by one, and fewer tokens read."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.distributed import World
from ppomax.errors import DataError
from ppomax.eval import likelihood
from ppomax.eval.likelihood import WORTH_A_CACHE, Likelihoods
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy, load_tokenizer

_PLAIN = runpy.run_path(str(Path(__file__).with_name("plain_choices.py")))
HERE = World(0, 1, torch.device("cpu"))
SHOTS = "Question: Is it wet?\nAnswer: Rain is wet and so is the sea, old and cold.\n\n"
OTHER = "The moon is round. The duck is not. Bread is neither, as all of us know well.\n\n"
ENDS = ["Why?\nAnswer:", "Why is it so, and since when?\nAnswer:", "Who?\nAnswer:"]
AFTER = [" A", " because of the rain", " a duck", " no", " the moon and the old sea"]


@pytest.fixture(scope="module")
def plain(tiny):
    return _PLAIN["plain_model"](tiny)


def scorer(name, micro_tokens=300):
    tokenizer, model = load_tokenizer(name), LanguageModel(load_policy(name, dtype=torch.float32))
    return Likelihoods(model, tokenizer, micro_tokens, HERE, torch.float32)


def asked(*questions):
    """(context, continuation) of every question, all continuations each."""
    return [(before, after) for before, afters in questions for after in afters]


def sums(score, pairs):
    contexts, continuations = zip(*pairs, strict=True)
    return score(contexts, continuations, ["file:1"] * len(pairs))


def one_by_one(plain, pairs):
    return [_PLAIN["plain_sums"](*plain, before, [after])[0] for before, after in pairs]


def counted(monkeypatch):
    """Sizes of what is read."""
    read, inner = [], likelihood.hidden_states

    def counting(model, ids, **named):
        read.append(ids.numel())
        return inner(model, ids, **named)

    monkeypatch.setattr(likelihood, "hidden_states", counting)
    return read


CASES = {
    "no examples": asked(*[(end, AFTER) for end in ENDS]),
    "the same examples": asked(*[(SHOTS * 2 + end, AFTER) for end in ENDS]),
    "two sets of examples and a question alone": asked(
        *[(SHOTS * 2 + end, AFTER) for end in ENDS],
        *[(OTHER * 2 + end, AFTER[::-1]) for end in ENDS],
        ("Alone", AFTER[:2]),
    ),
    "a context that is the beginning of another": asked(
        (SHOTS * 2, AFTER), (SHOTS * 2 + ENDS[0], AFTER), (SHOTS * 3, AFTER[:1])
    ),
    "a continuation twice, and of one token": asked((SHOTS * 2, [" A", " B", " A", " A duck"])),
}


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 400, 100_000])
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_texts_read_one_by_one(
    case, micro_tokens, supported, tiny, plain, monkeypatch
):
    monkeypatch.setattr(likelihood, "supports", lambda _: supported)
    found = sums(scorer(tiny, micro_tokens), CASES[case])
    assert found == pytest.approx(one_by_one(plain, CASES[case]), abs=2e-4)


@settings(max_examples=15)
@given(data=st.data())
def test_any_questions_in_any_order(data, tiny, plain):
    start = st.sampled_from(["", SHOTS * 2, SHOTS * 2 + OTHER, OTHER * 3])
    context = st.tuples(start, st.sampled_from(ENDS)).map("".join)
    pairs = data.draw(st.lists(st.tuples(context, st.sampled_from(AFTER)), min_size=1, max_size=12))
    micro_tokens = data.draw(st.sampled_from([1, 150, 1000]))
    found = sums(scorer(tiny, micro_tokens), pairs)
    assert found == pytest.approx(one_by_one(plain, pairs), abs=2e-4)


def test_a_context_is_read_once_and_examples_in_common_once_for_all(tiny, monkeypatch):
    read = counted(monkeypatch)
    score = scorer(tiny, 100_000)
    pairs = CASES["the same examples"]
    sums(score, pairs)
    stem, rest = read
    examples = len(score.tokenizer(SHOTS * 2)["input_ids"])
    assert stem >= examples - 1 >= WORTH_A_CACHE
    whole = sum(len(score.tokenizer(before + after)["input_ids"]) for before, after in pairs)
    assert stem + rest < whole / 4
    monkeypatch.setattr(score, "shares", False)
    read.clear()
    sums(score, pairs)
    assert sum(read) >= 0.8 * whole


def test_a_heading_in_common_does_not_hide_the_examples_behind_it(tiny, monkeypatch):
    read = counted(monkeypatch)
    score = scorer(tiny, 100_000)
    heading = "The following are questions, and each of them has one answer and no other.\n\n" * 2
    sizes = [len(score.tokenizer(text)["input_ids"]) for text in (heading, SHOTS * 4, OTHER * 4)]
    assert 2 * WORTH_A_CACHE < 2 * sizes[0] < min(sizes[1:])
    pairs = asked(*[(heading + shots * 4 + end, AFTER) for shots in (SHOTS, OTHER) for end in ENDS])
    sums(score, pairs)
    assert len(read) == 4  # each set's examples, and what stands on them
    assert sum(read) < 2 * sizes[0] + sum(sizes[1:]) + 300


def test_what_does_not_fit_the_model_is_named_by_its_row(tiny):
    score = scorer(tiny)
    score.limit = 20
    with pytest.raises(DataError, match=r"file:1: \d+ tokens with its examples, the model has 20"):
        sums(score, CASES["the same examples"])


def test_bfloat16_is_near(tiny, plain):
    tokenizer = load_tokenizer(tiny)
    model = LanguageModel(load_policy(tiny, dtype=torch.bfloat16))
    score = Likelihoods(model, tokenizer, 300, HERE, torch.bfloat16)
    found = sums(score, CASES["the same examples"])
    assert found == pytest.approx(one_by_one(plain, CASES["the same examples"]), rel=0.02)
