"""Recipes: YAML read strictly into pydantic models, with `key.sub=value` overrides.

Settings models stand beside the code that reads them; this module holds only what they share.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml.constructor import ConstructorError

from ppomax.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


S = TypeVar("S", bound=Settings)

_FLOAT, _DATE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
_POWER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""YAML 1.2's floats with an exponent; YAML 1.1 reads 1e-5 as text, people mean the number."""


class _Loader(yaml.SafeLoader):
    """Safe YAML: powers of ten are numbers, dates are text, a key stands once."""

    yaml_implicit_resolvers: Any = {
        first: [pair for pair in pairs if pair[0] != _DATE] + [(_FLOAT, _POWER)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # an alias to its own parent is then an error

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - yaml's own
        """A mapping; a key given twice is an error."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:place]):
                raise ConstructorError(
                    problem=f"{key.value} stands twice", problem_mark=key.start_mark
                )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401 - YAML values
        """A value; one that its tag does not fit is a YAML error, not Python's."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                problem=f"{node.value!r} is no {kind}", problem_mark=node.start_mark
            ) from None


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: text that looks like a number is quoted."""

    yaml_implicit_resolvers: Any = {
        first: [*pairs, (_FLOAT, _POWER)]
        for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def represent_scalar(self, tag: str, value: Any, style: Any = None) -> yaml.ScalarNode:  # noqa: ANN401 - yaml's own
        """A scalar; PyYAML reads U+0085 back only from double quotes."""
        quoted = isinstance(value, str) and "\x85" in value
        return super().represent_scalar(tag, value, '"' if quoted else style)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid"
        raise ConfigError(f"{path}{line}: not YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of settings, found {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `data` with each `key.sub=value` set; values are read as YAML.

    Raises:
        ConfigError: an override without `=`, or one that descends into a value.
    """
    result: dict[str, Any] = _copy(data)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {item!r}: write key.sub=value")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            value = text
        *parents, last = key.split(".")
        place: Any = result
        for part in parents:
            step = place.get(part)
            if step is None:
                step = place[part] = {}
            if not isinstance(step, dict):
                raise ConfigError(f"override {item!r}: {part} is a value, not a section")
            place = step
        place[last] = value
    return result


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; lists and values are replaced whole."""
    result: dict[str, Any] = _copy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = _copy(value)
    return result


def parse(model: type[S], data: dict[str, Any], source: str = "recipe") -> S:
    """`data` as a settings model.

    Raises:
        ConfigError: one line that names the setting, what was found and what would do.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_describe(error, model, data, source)) from None


def dump(settings: Settings) -> str:
    """The complete settings as YAML; parsing it again gives equal settings."""
    data = settings.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _copy(value: Any) -> Any:  # noqa: ANN401 - YAML values
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _describe(
    error: ValidationError, model: type[BaseModel], data: dict[str, Any], source: str
) -> str:
    first = error.errors()[0]
    parts = _setting(first["loc"], model, data)
    path = ".".join(parts)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        keys = _keys_at(model, parts[:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(keys))}"
        return f"{source}: unknown setting {path}{hint}{more}"
    if first["type"] == "missing":
        return f"{source}: setting {path} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    place = f"setting {path}: " if path else ""
    found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
    return f"{source}: {place}{message}{found}{more}"


def _setting(
    place: tuple[int | str, ...], model: type[BaseModel], data: dict[str, Any]
) -> list[str]:
    """A setting's path in the recipe: pydantic's place without the names of a union's branches."""
    path: list[str] = []
    value: Any = data
    for part in place:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif part in _keys_at(model, path):
            value = None
        else:
            continue
        path.append(str(part))
    return path


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the settings at a path of nested models (unions and lists looked through)."""
    models = [model]
    for part in path:
        inner: list[type[BaseModel]] = []
        for candidate in models:
            info = candidate.model_fields.get(part)
            if info is not None:
                inner += _models_in(info.annotation)
        models = inner or models
    return sorted({key for candidate in models for key in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type form
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (
        typing.Union,
        types.UnionType,
        list,
        dict,
        tuple,
        typing.Annotated,
    ):
        return [found for part in typing.get_args(annotation) for found in _models_in(part)]
    return []
