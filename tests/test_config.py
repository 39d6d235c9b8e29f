import math
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from ppomax.config import Settings, apply_overrides, dump, merge, parse, read_yaml
from ppomax.errors import ConfigError


class Clip(Settings):
    """A trick with values of its own."""

    low: float = Field(0.2, gt=0)
    """Below."""
    high: float = Field(0.2, gt=0)
    """Above."""


class Optim(Settings):
    """A section."""

    learning_rate: float = Field(1e-5, gt=0)
    """Rate."""
    steps: int = 10
    """Count."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two of them."""
    tags: list[str] = []
    """Free text."""

    @field_validator("steps")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


class Recipe(Settings):
    """All kinds of settings."""

    out: str
    """Where."""
    kind: Literal["small", "large"] = "small"
    """A choice."""
    optim: Optim = Optim()
    """A section that is always there."""
    clip: Clip | None = Clip()
    """A section that can be off."""
    reward_clip: float | None = 5.0
    """A value that can be off."""
    layers: list[Clip] = []
    """Sections in a list."""
    targets: Literal["all"] | list[str] = "all"
    """A word or a list."""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def refusal(data, model=Recipe, source="recipe"):
    with pytest.raises(ConfigError) as caught:
        parse(model, data, source)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- reading files


def test_a_recipe_is_read_as_a_mapping(tmp_path):
    path = write(tmp_path / "r.yaml", "out: runs/a\noptim: {steps: 4}\n# 注释\nname: 模型\n")
    assert read_yaml(path) == {"out": "runs/a", "optim": {"steps": 4}, "name": "模型"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such recipe"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "found"), [("- a\n- b\n", "list"), ("just words", "str"), ("", "None"), ("3", "int")]
)
def test_a_file_without_a_mapping_says_what_it_holds(tmp_path, text, found):
    with pytest.raises(ConfigError, match=rf"r\.yaml: a recipe is a mapping.*{found}"):
        read_yaml(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("out: a\nsft: [1, 2\nppo: 3\n", 3),
        ("a: 1\nb: 2\n\tc: 3\n", 3),
        ("a: 1\nb: *nowhere\n", 2),
        ("a: !!python/object/apply:os.system ['true']\n", 1),
        ("a: 1\n{[b]: 2}: 3\n", 2),
    ],
)
def test_a_syntax_error_gives_the_line_and_one_line_of_text(tmp_path, text, line):
    with pytest.raises(ConfigError, match=rf"r\.yaml:{line}: not YAML") as caught:
        read_yaml(write(tmp_path / "r.yaml", text))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"out: \xff\xfe")
    with pytest.raises(ConfigError, match=r"r\.yaml: cannot be read"):
        read_yaml(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"out: \x00\x01")
    with pytest.raises(ConfigError, match=r"r\.yaml.*not YAML"):
        read_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["bits: 0b_", "n: !!int abc", "n: !!bool abc"])
def test_a_value_yaml_cannot_convert_is_a_users_mistake(tmp_path, text):
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        read_yaml(write(tmp_path / "r.yaml", text))


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps"):
        read_yaml(write(tmp_path / "r.yaml", "optim:\n  steps: 4\n  steps: 8\n"))


def test_a_recipe_that_holds_itself_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"r\.yaml:2: not YAML: .*recursive"):
        read_yaml(write(tmp_path / "r.yaml", "out: a\noptim: &o\n  steps: *o\n"))


# --- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("+2e3", 2000.0),
        (".5e1", 5.0),
        ("5e-7", 5e-7),
        ("0.1", 0.1),
        ("7", 7),
        ("-3", -3),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("word", "word"),
        ("'7'", "7"),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
        ("-e", "-e"),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("a=b", "a=b"),
        ("a: b: c", "a: b: c"),
        ("[", "["),
        ("runs/x y", "runs/x y"),
    ],
)
def test_override_values_are_read_as_yaml_and_powers_of_ten_as_numbers(text, value):
    result = apply_overrides({}, [f"key={text}"])["key"]
    assert result == value
    assert type(result) is type(value)


def test_a_run_directory_can_be_named_by_a_date():
    assert parse(Recipe, apply_overrides({}, ["out=2026-09-01"])).out == "2026-09-01"


def test_a_date_in_a_recipe_is_text(tmp_path):
    found = read_yaml(write(tmp_path / "r.yaml", "a: 2026-09-01\nb: 2026-13-45\n"))
    assert found == {"a": "2026-09-01", "b": "2026-13-45"}


def test_keys_laid_over_a_merged_mapping_are_not_given_twice(tmp_path):
    text = "one: {deep: {a: &a {<<: &b {x: 1}, x: 2}}}\nc: {<<: *a, x: 3}\n"
    assert read_yaml(write(tmp_path / "r.yaml", text))["c"] == {"x": 3}


@pytest.mark.parametrize("text", ["2026-13-45", "0b_"])
def test_an_override_yaml_cannot_convert_is_text(text):
    assert apply_overrides({}, [f"key={text}"]) == {"key": text}


def test_overrides_reach_into_sections_make_them_and_leave_the_input_alone():
    data = {"a": {"b": 1, "c": [1]}, "off": None}
    result = apply_overrides(data, ["a.b=2", "new.deep.x=3", "off.y=4", "a.b=5"])
    assert result == {"a": {"b": 5, "c": [1]}, "new": {"deep": {"x": 3}}, "off": {"y": 4}}
    assert data == {"a": {"b": 1, "c": [1]}, "off": None}
    result["a"]["c"].append(2)
    assert data["a"]["c"] == [1]


def test_a_section_can_be_turned_off_and_replaced_whole():
    assert apply_overrides({"kl": {"coef": 1}}, ["kl=null"]) == {"kl": None}
    assert apply_overrides({"kl": {"coef": 1}}, ["kl={target: 6}"]) == {"kl": {"target": 6}}


@pytest.mark.parametrize("item", ["steps", "=3", ""])
def test_an_override_without_key_or_sign_says_how_to_write_it(item):
    with pytest.raises(ConfigError, match=r"write key\.sub=value"):
        apply_overrides({}, [item])


def test_an_override_below_a_value_names_the_value():
    with pytest.raises(ConfigError, match="steps is a value"):
        apply_overrides({"optim": {"steps": 4}}, ["optim.steps.x=1"])
    with pytest.raises(ConfigError, match="layers is a value"):
        apply_overrides({"layers": [1]}, ["layers.0=1"])


@pytest.mark.parametrize("item", ["optim..steps=4", ".out=3", "out.=3"])
def test_an_override_with_an_empty_part_in_its_key_is_refused(item):
    with pytest.raises(ConfigError):
        parse(Recipe, apply_overrides({"out": "a"}, [item]))


# --- merging


def test_merge_lays_sections_over_sections_and_replaces_the_rest():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 2, "c": {"z": 1}}
    over = {"a": {"y": [3]}, "b": {"n": 1}, "c": None}
    merged = merge(base, over)
    assert merged == {"a": {"x": 1, "y": [3]}, "b": {"n": 1}, "c": None}
    merged["a"]["y"].append(4)
    merged["b"]["n"] = 9
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 2, "c": {"z": 1}}
    assert over == {"a": {"y": [3]}, "b": {"n": 1}, "c": None}


TREES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@settings(max_examples=60)
@given(SECTIONS, SECTIONS)
def test_merge_keeps_every_key_and_the_upper_value_wins(base, over):
    merged = merge(base, over)
    assert set(merged) == set(base) | set(over)
    for key, value in over.items():
        if not isinstance(value, dict):
            assert merged[key] == value
    assert merge(base, {}) == base
    assert merge(merged, over) == merged


# --- parsing


def test_a_complete_recipe_parses_and_powers_of_ten_in_yaml_are_numbers(tmp_path):
    text = "out: a\noptim: {learning_rate: 5e-7, betas: [9e-1, 0.5], steps: 2e1}\nreward_clip: null"
    found = parse(Recipe, read_yaml(write(tmp_path / "r.yaml", text)))
    assert found.optim == Optim(learning_rate=5e-7, betas=(0.9, 0.5), steps=20)
    assert found.reward_clip is None
    assert found.clip == Clip()


@pytest.mark.parametrize(
    ("data", "path", "near"),
    [
        ({"out": "a", "optm": {}}, "optm", "optim"),
        ({"out": "a", "optim": {"learning_rat": 1}}, "optim.learning_rat", "learning_rate"),
        ({"out": "a", "clip": {"hihg": 1}}, "clip.hihg", "high"),
        ({"out": "a", "layers": [{}, {"lo": 1}]}, "layers.1.lo", "low"),
    ],
)
def test_an_unknown_setting_is_named_by_its_path_with_the_nearest_known(data, path, near):
    text = refusal(data, source="r.yaml")
    assert text == f"r.yaml: unknown setting {path}; did you mean {near}?"


def test_an_unknown_setting_unlike_any_other_lists_the_known_ones():
    text = refusal({"out": "a", "clip": {"zzz": 1}})
    assert "unknown setting clip.zzz; known here: high, low" in text


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"out": "a", "optim": {"steps": "many"}}, ["setting optim.steps", "integer", "'many'"]),
        ({"out": "a", "optim": {"steps": 2.5}}, ["setting optim.steps", "2.5"]),
        ({"out": "a", "optim": {"learning_rate": 0}}, ["optim.learning_rate", "greater than 0"]),
        ({"out": "a", "optim": {"learning_rate": math.nan}}, ["optim.learning_rate", "finite"]),
        ({"out": "a", "optim": {"learning_rate": "1e999"}}, ["optim.learning_rate", "finite"]),
        ({"out": "a", "optim": {"betas": [0.9]}}, ["optim.betas"]),
        ({"out": "a", "kind": "medium"}, ["setting kind", "'small' or 'large'", "'medium'"]),
        ({"out": 3}, ["setting out", "string", "3"]),
        ({"out": "a", "optim": 3}, ["setting optim", "3"]),
        ({"out": "a", "optim": None}, ["setting optim", "None"]),
        ({"out": "a", "optim": {"steps": 3}}, ["setting optim.steps: must be even, found 3"]),
        ({}, ["setting out is missing"]),
        ({"out": "a", 7: 1}, ["7"]),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found_and_what_would_do(data, parts):
    text = refusal(data)
    for part in parts:
        assert part in text


def test_further_mistakes_are_counted():
    text = refusal({"out": 1, "kind": "x", "optim": {"steps": "y"}})
    assert text.endswith("(and 2 more)")


def test_a_wrong_value_of_a_union_is_named_by_the_settings_own_path():
    text = refusal({"out": "a", "targets": 5})
    assert "setting targets:" in text


def test_settings_are_immutable_and_check_their_defaults():
    with pytest.raises(ValidationError):
        Optim().steps = 4  # type: ignore[misc]

    class Wrong(Settings):
        """Its default is not allowed."""

        count: int = Field(0, gt=0)
        """Count."""

    with pytest.raises(ConfigError, match="setting count"):
        parse(Wrong, {})


def test_a_fields_docstring_is_its_description():
    assert Clip.model_fields["low"].description == "Below."


# --- writing


def test_a_dumped_recipe_parses_to_the_same_settings():
    full = Recipe(
        out="runs/模型: a",
        optim=Optim(learning_rate=5e-7, tags=["no", "1", "null", "a: b"], betas=(0.9, 1e-12)),
        clip=None,
        layers=[Clip(low=1e-30)],
        targets=["q_proj"],
    )
    assert parse(Recipe, yaml.safe_load(dump(full))) == full
    assert list(yaml.safe_load(dump(full))) == list(Recipe.model_fields)


WORDS = st.text(st.characters(codec="utf-8"), max_size=6)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    st.floats(min_value=1e-300, max_value=1e300),
    st.lists(WORDS, max_size=3),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_settings_survive_dump_and_parse(rate, tags, clip):
    whole = Recipe(out="x", optim=Optim(learning_rate=rate, tags=tags), reward_clip=clip)
    assert parse(Recipe, yaml.safe_load(dump(whole))) == whole


def test_a_next_line_character_survives_dump_and_parse():
    whole = Recipe(out="x", optim=Optim(tags=["a\x85b"]))
    assert parse(Recipe, yaml.safe_load(dump(whole))) == whole


@pytest.mark.parametrize("text", ["1e5", "3e2", ".1e1", "-2E4"])
def test_text_that_looks_like_a_number_survives_dump_and_parse(text):
    whole = Recipe(out=text, optim=Optim(tags=[text]))
    assert parse(Recipe, yaml.safe_load(dump(whole))) == whole
    assert parse(Recipe, apply_overrides({}, [f"out={dump(whole)[5:].split()[0]}"])).out == text
