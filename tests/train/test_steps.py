"""Steps of a reply: where its text is cut, and on which tokens the pieces end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.data.template import ChatTemplate
from ppomax.models.load import load_tokenizer
from ppomax.train.steps import Step, last_tokens, split_steps

examples = settings(max_examples=60, derandomize=True, database=None)


@pytest.fixture(scope="module")
def template(tiny):
    return ChatTemplate(load_tokenizer("tiny"))


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("one\n\ntwo", "\n\n", [("one", 5), ("two", 8)]),
        ("one\n\n\n\ntwo\n\n", "\n\n", [("one", 5), ("two", 12)]),
        ("one", "\n\n", [("one", 3)]),
        ("a;b;; ;c", ";", [("a", 2), ("b", 4), ("c", 8)]),
        ("二。三", "。", [("二", 2), ("三", 3)]),
        ("", "\n\n", [("", 0)]),
        (" \n\n ", "\n\n", [(" \n\n ", 4)]),
    ],
    ids=repr,
)
def test_a_text_is_cut_at_every_separator_and_blank_pieces_are_no_steps(text, separator, expected):
    assert split_steps(text, separator) == [Step(*pair) for pair in expected]


def places(template, ids, separator):
    text = template.decode(ids)
    return last_tokens(ids, text, split_steps(text, separator), template.decode)


def test_a_step_ends_with_its_separators_last_token_and_the_last_with_the_reply(template):
    # bytes as tokens: G o ; N o ; and the end token
    letters = {letter: template.tokenizer.convert_tokens_to_ids(letter) for letter in "Go;N"}
    ids = [letters[letter] for letter in "Go;No;"]
    assert places(template, ids, ";") == [2, 5]
    assert places(template, [*ids, template.end_id], ";") == [2, 6], "its end token is its last"
    assert places(template, [*ids, letters["G"]], ";") == [2, 5, 6]
    assert places(template, [template.end_id], ";") == [0]


def test_a_character_of_several_bytes_ends_with_its_last_byte(template):
    # U+3002, three bytes, written as three tokens: none of the first two ends the step
    table = template.tokenizer.convert_tokens_to_ids
    stop = [table(token) for token in ("ã", "Ģ", "Ĥ")]
    assert template.decode(stop) == "。"
    ids = [table("G"), *stop, table("N")]
    assert places(template, ids, "。") == [3, 4]


@examples
@given(
    ids=st.lists(st.integers(4, 400), min_size=1, max_size=40),
    separator=st.sampled_from([" ", "e", "er", "a t"]),
)
def test_a_step_ends_at_the_first_token_that_completes_it_however_it_was_tokenised(
    ids, separator, template
):
    text = template.decode(ids)
    steps = split_steps(text, separator)
    found = last_tokens(ids, text, steps, template.decode)
    assert found[-1] == len(ids) - 1
    for step, token in zip(steps[:-1], found[:-1], strict=True):
        # the oracle walks token by token
        whole = [
            template.decode(ids[: n + 1])[: step.end] == text[: step.end] for n in range(len(ids))
        ]
        assert whole.index(True) == token
    assert found == sorted(found)


def test_a_reply_is_never_tokenised_again(template, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("tokenised")

    ids = template.answer("First this; then that; done.")
    monkeypatch.setattr(type(template.tokenizer), "__call__", refuse)
    assert len(places(template, ids, ";")) == 3
