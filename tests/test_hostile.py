"""What comes from elsewhere and means harm is refused in one line; nothing of it is run."""

import json
import pickle
import shutil
import struct

import pytest
import torch

from ppomax import checkpoint
from ppomax.data.template import ChatTemplate
from ppomax.errors import CheckpointError, ModelError
from ppomax.models.load import load_policy, load_tokenizer


def header(text, data=b"", length=None):
    """A safetensors file with any header."""
    raw = text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
MALICIOUS = {
    "a header longer than the file": header("{}", length=2**62),
    "a header of a hundred gigabytes": header("{}", b"x" * 64, length=10**11),
    "no JSON": header("{'w'"),
    "offsets outside": header(json.dumps({"w": TENSOR | {"data_offsets": [0, 80]}}), b"x" * 8),
    "offsets backwards": header(json.dumps({"w": TENSOR | {"data_offsets": [8, 0]}}), b"x" * 8),
    "a shape of another size": header(json.dumps({"w": TENSOR | {"shape": [2**40]}}), b"x" * 8),
    "a shape that overflows": header(json.dumps({"w": TENSOR | {"shape": [2**33] * 2}}), b"x" * 8),
    "overlapping tensors": header(json.dumps({"w": TENSOR, "v": TENSOR}), b"x" * 8),
    "a type nobody knows": header(json.dumps({"w": TENSOR | {"dtype": "OBJECT"}}), b"x" * 8),
    "nothing": b"",
    "a pickle": pickle.dumps({"w": print}),
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_malicious_tensor_file_is_one_line_though_its_digest_is_right(kind, tmp_path):
    path = checkpoint.save(tmp_path, 1, {"policy": {"w": torch.zeros(2)}}, {"step": 1})
    (path / "policy.safetensors").write_bytes(MALICIOUS[kind])
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    digest = checkpoint._digest(path / "policy.safetensors")
    manifest["files"]["policy.safetensors"] = digest
    (path / checkpoint.MANIFEST).write_text(checkpoint._manifest(**manifest))
    with pytest.raises(CheckpointError, match=r"policy\.safetensors cannot be read"):
        checkpoint.latest(tmp_path).tensors("policy")


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_model_folder_with_such_a_file_is_one_line(kind, tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").write_bytes(MALICIOUS[kind])
    with pytest.raises(ModelError):
        load_policy(str(folder))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "..", ""])
def test_a_manifest_that_names_files_elsewhere_is_none(name, tmp_path):
    root = tmp_path / "checkpoints"
    path = checkpoint.save(root, 1, {"policy": {"w": torch.zeros(2)}}, {"step": 1})
    (root / "outside").write_text("x")
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = checkpoint._digest(root / "outside")
    (path / checkpoint.MANIFEST).write_text(checkpoint._manifest(**manifest))
    assert checkpoint.latest(root) is None


TEMPLATES = {
    "reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches for globals": "{{ cycler.__init__.__globals__ }}",
    "changes what it was given": "{{ messages.append(messages) }}",
    "counts without end": "{% for i in range(10000000) %}{{ i }}{% endfor %}",
    "reads files": "{% include '/etc/hostname' %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_is_a_program_is_refused(kind, tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATES[kind]
    with pytest.raises(ModelError):
        ChatTemplate(tokenizer)
