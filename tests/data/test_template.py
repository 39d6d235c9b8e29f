import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from ppomax.data.template import FALLBACK_TEMPLATE, ChatTemplate, Encoded
from ppomax.errors import ModelError
from ppomax.models.tiny import CHAT_TEMPLATE, tiny_tokenizer
from ppomax.types import Message

TEXTS = ["the sea is wide and the ship is small", "rice, water, salt\n\nHuman: hello"] * 20

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'"
    "+ message['content'] | trim + '<|eot|>' %}"
    "{% if loop.first %}{% set content = '<|bos|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
STRIPS = CHAT_TEMPLATE.replace("message['content']", "(message['content'] | trim)")
NO_HEADER = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MISTRAL = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKS = (  # as Qwen 3: an empty thought before the last answer, none before earlier ones
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_TURN_ONLY = (
    "{{ messages | length }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + message['content'] + '<|im_end|>' }}{% endfor %}"
)

SPECIAL = {
    "additional_special_tokens": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|bos|>",
        "<|start|>",
        "<|end|>",
        "<|eot|>",
    ]
}


def tokenizer_with(template, **special):
    tokenizer = tiny_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens(SPECIAL | special)
    tokenizer.chat_template = template
    return tokenizer


def chat(template, system=None, **special):
    return ChatTemplate(tokenizer_with(template, **special), system)


def talk(*contents, system=None):
    """A dialogue of user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    turns = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    return [Message(role="system", content=system), *turns] if system is not None else turns


def text_of(template, ids):
    return template.tokenizer.decode(ids, skip_special_tokens=False)


def spans(template, encoded):
    """Text of each run of assistant tokens."""
    found, current = [], []
    for token, mine in zip(encoded.ids, encoded.mask, strict=True):
        if mine:
            current.append(token)
        elif current:
            found.append(text_of(template, current))
            current = []
    return [*found, text_of(template, current)] if current else found


def same_ids_everywhere(template, messages):
    """SFT's ids of the dialogue are the prompt's ids and then the answer's (pitfall 26)."""
    encoded = template.encode(messages)
    prompt = template.prompt(messages[:-1])
    answer = template.answer(messages[-1]["content"])
    assert encoded.ids == prompt + answer
    assert encoded.mask[len(prompt) :] == [True] * len(answer)
    return encoded


ALL = {
    "chatml": CHAT_TEMPLATE,
    "smollm": SMOLLM,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "none": None,
    "strips": STRIPS,
}


# --- one answer


@pytest.mark.parametrize("name", ALL)
def test_prompt_and_answer_are_the_ids_of_the_dialogue(name):
    template = chat(ALL[name])
    encoded = same_ids_everywhere(template, talk("hello ship", "the sea is wide"))
    assert encoded.ids[-1] == template.end_id
    assert encoded.mask[-1]
    assert encoded.num_targets == sum(encoded.mask) == len(template.answer("the sea is wide"))


@pytest.mark.parametrize("name", ALL)
def test_prompt_and_answer_are_the_ids_of_the_dialogue_over_several_turns(name):
    template = chat(ALL[name])
    messages = talk("hello", "the sea", "more\nof it", "salt, rice", "and?", "water")
    encoded = same_ids_everywhere(template, messages)
    same_ids_everywhere(template, messages[:4])
    end = template.end_text
    assert spans(template, encoded) == [f"the sea{end}", f"salt, rice{end}", f"water{end}"]
    shorter = template.encode(messages[:4])
    assert encoded.ids[: len(shorter.ids)] == shorter.ids
    assert encoded.mask[: len(shorter.ids)] == shorter.mask


@pytest.mark.parametrize("name", ALL)
def test_the_text_is_the_templates_own_up_to_the_last_end(name):
    template = chat(ALL[name])
    messages = talk("hello", "the sea", "more", "salt")
    whole = template.tokenizer.apply_chat_template(messages, tokenize=False)
    cut = whole[: whole.rindex(template.end_text) + len(template.end_text)]
    assert text_of(template, template.encode(messages).ids) == cut
    prompt = template.tokenizer.apply_chat_template(
        messages[:3], tokenize=False, add_generation_prompt=True
    )
    assert text_of(template, template.prompt(messages[:3])) == prompt


def test_the_ids_of_a_dialogue_worked_by_hand():
    template = chat(CHAT_TEMPLATE)
    tokenizer = template.tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    encoded = template.encode(talk("hi", "a", "b", "c"))
    pieces = [
        (ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), False),
        ([*ids("a"), tokenizer.eos_token_id], True),
        (ids("\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"), False),
        ([*ids("c"), tokenizer.eos_token_id], True),
    ]
    assert encoded.ids == [token for piece, _ in pieces for token in piece]
    assert encoded.mask == [mine for piece, mine in pieces for _ in piece]


@pytest.mark.parametrize("name", ALL)
def test_the_beginning_of_text_stands_once_and_only_where_the_template_puts_it(name):
    template = chat(ALL[name])
    ids = template.encode(talk("a", "b", "c", "d")).ids
    bos = template.tokenizer.convert_tokens_to_ids("<|bos|>")
    assert ids.count(bos) == (name in ("llama3", "mistral"))
    assert bos not in ids[1:]


def test_a_tokenizer_that_adds_special_tokens_of_its_own_does_not_add_them_here():
    from tokenizers.processors import TemplateProcessing

    template = chat(CHAT_TEMPLATE)
    bos = template.tokenizer.convert_tokens_to_ids("<|bos|>")
    before = template.encode(talk("a", "b", "c", "d"))
    template.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert template.tokenizer("a")["input_ids"][0] == bos
    assert template.encode(talk("a", "b", "c", "d")) == before
    assert template.prompt(talk("a"))[0] != bos
    assert template.answer("a")[0] != bos


def test_an_empty_answer_is_its_end_alone():
    template = chat(CHAT_TEMPLATE)
    encoded = same_ids_everywhere(template, talk("hi", ""))
    assert encoded.num_targets == 1
    assert template.answer("") == [template.end_id]


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="<|[>\x00"), min_size=1, max_size=12
)
TEMPLATES = {name: chat(ALL[name]) for name in ("chatml", "smollm", "mistral", "none")}


@settings(max_examples=60)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(WORDS, min_size=2, max_size=6))
def test_any_text_has_the_same_ids_in_every_stage_and_comes_back_unchanged(name, contents):
    template = TEMPLATES[name]
    contents = contents[: len(contents) // 2 * 2]
    same_ids_everywhere(template, talk(*contents))
    assert template.decode(template.answer(contents[-1])) == contents[-1]


# --- templates that change what they are given


@pytest.mark.parametrize("name", ["strips", "llama3"])
@pytest.mark.parametrize("answer", [" the sea", "the sea\n", "\n\n the sea  "])
def test_a_template_that_strips_gives_the_same_ids_in_every_stage(name, answer):
    same_ids_everywhere(chat(ALL[name]), talk("hello", "x", "more", answer))


@pytest.mark.parametrize("name", ["strips", "llama3"])
def test_a_template_that_strips_an_earlier_answer_still_gives_a_prompt(name):
    template = chat(ALL[name])
    messages = talk("hello", " the sea \n", "more", "salt")
    encoded = same_ids_everywhere(template, messages)
    assert encoded.num_targets == sum(encoded.mask)


@pytest.mark.parametrize("turns", [2, 4])
def test_a_template_that_writes_no_header_for_the_answer_is_refused_or_agrees(turns):
    messages = talk("hello", "the sea", "more", "salt")[:turns]
    try:
        template = chat(NO_HEADER)
        encoded = template.encode(messages)
    except ModelError:
        return
    assert encoded.ids == template.prompt(messages[:-1]) + template.answer(messages[-1]["content"])


@pytest.mark.parametrize("turns", [2, 4])
def test_a_template_that_writes_before_the_last_answer_is_refused_or_agrees(turns):
    messages = talk("hello", "the sea", "more", "salt")[:turns]
    template = chat(THINKS)
    try:
        encoded = template.encode(messages)
    except ModelError:
        return
    assert encoded.ids == template.prompt(messages[:-1]) + template.answer(messages[-1]["content"])


def test_a_template_that_ends_no_answer_ends_it_with_eos_and_agrees():
    template = chat(NO_END)
    assert template.end_id == template.tokenizer.eos_token_id
    encoded = same_ids_everywhere(template, talk("hello", "the sea"))
    assert encoded.ids[-1] == template.end_id


def test_a_template_that_ends_no_answer_agrees_over_several_turns():
    same_ids_everywhere(chat(NO_END), talk("hello", "the sea", "more", "salt"))


def test_a_template_that_changes_earlier_text_is_refused():
    template = chat(LAST_TURN_ONLY)
    with pytest.raises(ModelError, match="not prefix-preserving"):
        template.encode(talk("a", "b", "c", "d"))
    with pytest.raises(ModelError, match="not prefix-preserving"):
        template.prompt(talk("a", "b", "c"))


def test_what_a_template_itself_refuses_is_a_models_error():
    template = chat(MISTRAL)
    with pytest.raises(ModelError, match="roles must alternate"):
        template.prompt(talk("a", system="be kind"))


def test_an_answer_that_holds_the_end_text_has_the_same_ids_in_every_stage():
    same_ids_everywhere(chat(CHAT_TEMPLATE), talk("hi", "write <|im_end|> like this"))


def test_an_earlier_answer_that_holds_the_end_text_has_the_same_ids_in_every_stage():
    same_ids_everywhere(chat(CHAT_TEMPLATE), talk("hi", "a <|im_end|> b", "more", "salt"))


# --- the end of an answer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT_TEMPLATE, "<|im_end|>"),
        (SMOLLM, "<|im_end|>"),
        (LLAMA3, "<|eot|>"),
        (MISTRAL, "<|endoftext|>"),
        (NO_END, "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
)
def test_the_end_is_what_the_template_writes_behind_an_answer_else_eos(template, end):
    names = [*SPECIAL["additional_special_tokens"], "<|im_end|>"]
    found = chat(template, eos_token="<|endoftext|>", additional_special_tokens=names)
    assert found.end_text == end
    assert found.end_id == found.tokenizer.convert_tokens_to_ids(end)


def test_an_end_that_is_special_but_has_no_name_of_its_own_is_found():
    tokenizer = tiny_tokenizer(TEXTS, 300)  # as Llama 3: special: true, and in no list of names
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|eot|>")
    template = ChatTemplate(tokenizer)
    assert template.end_text == "<|eot|>"


def test_a_tokenizer_without_any_end_is_refused():
    tokenizer = tiny_tokenizer(TEXTS, 300)
    tokenizer.eos_token = None
    tokenizer.chat_template = NO_END
    with pytest.raises(ModelError, match="no end-of-text token"):
        ChatTemplate(tokenizer)


def test_without_a_template_the_dialogue_form_is_used_and_stays_with_the_tokenizer():
    template = chat(None)
    assert template.tokenizer.chat_template == FALLBACK_TEMPLATE
    text = text_of(template, template.encode(talk("a", "b", "c", "d", system="be kind")).ids)
    eos = template.tokenizer.eos_token
    assert text == (f"be kind\n\nHuman: a\n\nAssistant: b{eos}\n\nHuman: c\n\nAssistant: d{eos}")


@pytest.mark.parametrize("name", ALL)
def test_a_pad_that_is_the_eos_changes_no_mask(name):
    apart, same = chat(ALL[name]), chat(ALL[name], pad_token="<|im_end|>")
    assert same.tokenizer.pad_token_id == same.tokenizer.eos_token_id
    messages = talk("hello", "the sea", "more", "salt")
    assert same.encode(messages) == apart.encode(messages)
    encoded = same.encode(messages)
    assert encoded.ids[-1] == same.end_id
    assert encoded.mask[-1]


# --- system prompts


def test_the_system_prompt_stands_first_unless_the_dialogue_brings_one():
    template = chat(SMOLLM, system="be kind")
    encoded = same_ids_everywhere(template, talk("hi", "a", "b", "c"))
    assert text_of(template, encoded.ids).startswith("<|im_start|>system\nbe kind<|im_end|>")
    assert text_of(template, encoded.ids).count("system") == 1
    own = text_of(template, template.prompt(talk("hi", system="be brief")))
    assert "be brief" in own
    assert "be kind" not in own


def test_an_empty_system_prompt_is_one_and_none_leaves_it_to_the_template():
    empty, default = chat(SMOLLM, system=""), chat(SMOLLM)
    text = text_of(empty, empty.prompt(talk("hi")))
    assert text.startswith("<|im_start|>system\n<|im_end|>")
    assert "helpful AI assistant" in text_of(default, default.prompt(talk("hi")))


def test_the_messages_passed_are_left_as_they_were():
    messages = talk("hi", "a")
    before = json.dumps(messages)
    chat(SMOLLM, system="x").encode(messages)
    assert json.dumps(messages) == before


# --- fitting


def test_a_prompt_that_fits_is_left_whole():
    template = chat(CHAT_TEMPLATE)
    messages = tuple(talk("one", "a", "two"))
    ids = template.prompt(messages)
    assert template.fit(messages, len(ids)) == (messages, ids)


def test_the_oldest_turns_are_dropped_until_the_prompt_fits():
    template = chat(CHAT_TEMPLATE)
    messages = tuple(talk("one", "a", "two", "b", "three", system="be kind"))
    size = len(template.prompt(messages))
    seen = []
    for limit in range(size, 0, -1):
        fitted = template.fit(messages, limit)
        if fitted is None:
            break
        kept, ids = fitted
        assert len(ids) <= limit
        assert ids == template.prompt(kept)
        assert kept[0] == messages[0], "the system turn stays"
        assert kept[1]["role"] == "user"
        assert kept[1:] == messages[-len(kept) + 1 :]
        if kept not in seen:
            seen.append(kept)
    assert [len(kept) for kept in seen] == [6, 4, 2]
    assert template.fit(messages, limit) is None


def test_dropping_turns_never_leaves_an_answer_first():
    template = chat(CHAT_TEMPLATE)
    messages = (
        *talk("one", "a"),
        Message(role="assistant", content="b"),
        Message(role="user", content="two"),
    )
    short = template.prompt(messages[-1:])
    assert template.fit(messages, len(short)) == (messages[-1:], short)


def test_a_last_turn_that_is_too_long_fits_nowhere():
    template = chat(CHAT_TEMPLATE)
    assert template.fit(tuple(talk("one", "a", "much longer " * 20)), 20) is None
    assert template.fit((), 20) is None
    assert template.fit(tuple(talk(system="only")), 20) is None


# --- decoding


def test_decoding_leaves_out_the_end_and_nothing_else():
    template = chat(CHAT_TEMPLATE)
    ids = template.answer("the sea , it 's <|im_start|> wide .")
    assert template.decode(ids) == "the sea , it 's <|im_start|> wide ."
    assert template.decode(ids[:-1]) == template.decode(ids)
    assert template.decode([*ids, template.end_id]) == template.decode(ids) + "<|im_end|>"
    assert template.decode([]) == ""
    assert template.decode([template.end_id]) == ""


def test_decoding_leaves_spaces_before_punctuation_alone():
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's configuration says
    template = ChatTemplate(tokenizer)
    assert template.decode(template.answer("a , b . do n't")) == "a , b . do n't"


def test_the_number_of_targets_is_that_of_assistant_tokens():
    assert Encoded([1, 2, 3], [False, True, True]).num_targets == 2
    assert Encoded([], []).num_targets == 0


def test_a_template_that_prints_today_s_date_gives_the_same_ids_every_day():
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE
    template = chat(dated)
    assert text_of(template, template.prompt(talk("hello"))).startswith("Today is 26 Jul 2024")


@pytest.mark.parametrize("adds", [True, False])
def test_without_a_template_a_dialogue_starts_as_the_tokenizer_starts_a_text(adds):
    tokenizer = tokenizer_with(None)
    tokenizer.bos_token = "<|bos|>"
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
        )
    ids = ChatTemplate(tokenizer).prompt(talk("hello"))
    assert (ids[0] == tokenizer.bos_token_id) == adds
    assert ids.count(tokenizer.bos_token_id) == adds
