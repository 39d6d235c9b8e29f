"""What a model is called: a short name, a folder, a hub id; and what its folder says of it."""

import difflib
import os
import re
from pathlib import Path

from ppomax.errors import ModelError
from ppomax.models.export import source_licence, trained_system
from ppomax.models.pull import NAME, cache_dir, pull

SHORT_NAMES = (NAME, "tiny")


def resolve(name: str) -> str:
    """Where a model is: a folder for short names and local paths, else the hub id itself.

    Raises:
        ModelError: a path that is no model folder (the text says what is missing), or a name
            that can be neither path nor hub id.
    """
    if name in SHORT_NAMES:
        return str(pull(name, cache=cache_dir(os.environ)))
    path = Path(name).expanduser()
    if name and path.exists():
        _check_folder(path)
        return str(path)
    near = difflib.get_close_matches(name, SHORT_NAMES, n=1, cutoff=0.75)
    if near:
        raise ModelError(f"model {name!r}: no such folder; did you mean {near[0]}?")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return name
    raise ModelError(
        f"model {name!r}: no such folder, and not a short name ({', '.join(SHORT_NAMES)}) or hub id"
    )


def licence_of(name: str) -> str | None:
    """What a model says of its licence, where it is a folder here."""
    place = Path(resolve(name))
    return source_licence(place) if place.is_dir() else None


def system_of(name: str) -> str | None:
    """The system prompt of a policy's training, where it is a folder that says so."""
    place = Path(resolve(name))
    return trained_system(place) if place.is_dir() else None


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise ModelError(f"model {path}: a file; a model is a folder in Hugging Face format")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ModelError(f"model {path}: a LoRA adapter alone; use a merged export")
    inner = [path / "export", path / "ppo" / "export", path / "sft" / "export"]
    near = next((place for place in inner if (place / "config.json").exists()), None)
    hint = f"; did you mean {near}?" if near is not None else ""
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not (path / "config.json").exists():
        raise ModelError(f"model {path}: not a model folder, config.json is missing{hint}")
    if not any((path / file).exists() for file in tokenizers):
        raise ModelError(f"model {path}: its tokenizer is missing (tokenizer.json)")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"model {path}: no .safetensors weights; pickled ones are not read, save it again with "
            "save_pretrained"
        )
