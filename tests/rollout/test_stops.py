import pytest

from ppomax.data.template import ChatTemplate
from ppomax.models.tiny import tiny_tokenizer
from ppomax.rollout.stops import StopStrings

TEXTS = ["the sea is wide and the ship is small", "rice, water, salt"] * 20
TEMPLATE = ChatTemplate(tiny_tokenizer(TEXTS, 300))
STOPS = StopStrings(TEMPLATE)


def ids(text):
    return TEMPLATE.tokenizer(text, add_special_tokens=False)["input_ids"]


def first_hit(text, stop):
    """Number of tokens after which the reply would have ended."""
    tokens = ids(text)
    return next((n for n in range(1, len(tokens) + 1) if STOPS.hit(tokens[:n], stop)), None)


def test_without_stop_strings_nothing_stops():
    assert not STOPS.hit(ids("anything at all"), [])


@pytest.mark.parametrize("stop", ["\n\nHuman:", "sea is", "X", "ship", "汉字", "🙂", " "])
def test_a_reply_stops_at_the_token_that_completes_the_string(stop):
    text = f"the_{stop}_and more"
    count = first_hit(text, ["nowhere", stop])
    assert count is not None
    assert stop in TEMPLATE.decode(ids(text)[:count])
    assert stop not in TEMPLATE.decode(ids(text)[: count - 1])


def test_a_text_without_the_string_does_not_stop():
    assert first_hit("the sea is wide and the ship is small " * 5, ["seas", "Ship"]) is None


def test_a_string_found_late_in_a_long_reply_stops_it():
    text = "x" * 200 + "STOP" + "y"
    count = first_hit(text, ["STOP"])
    assert TEMPLATE.decode(ids(text)[:count]).endswith("STOP")


def test_half_a_character_is_no_match_and_no_error():
    tokens = ids("汉")
    assert len(tokens) == 3
    assert not STOPS.hit(tokens[:1], ["汉"])
    assert not STOPS.hit(tokens[1:], ["汉"])
    assert STOPS.hit(tokens, ["汉"])


def test_the_end_of_turn_token_hides_no_string_before_it():
    assert STOPS.hit(TEMPLATE.answer("a STOP"), ["STOP"])


@pytest.mark.parametrize("length", [31, 32, 33, 100])
def test_a_stop_string_of_any_length_in_tokens_is_found(length):
    stop = "Q" * length
    assert len(ids(stop)) == length
    assert first_hit(f"a{stop}b", [stop]) is not None
