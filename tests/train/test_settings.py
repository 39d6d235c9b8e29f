"""Settings every stage shares."""

import pytest

from ppomax.eval.policy_config import EvalConfig
from ppomax.train import settings
from ppomax.train.sft import SFTConfig

ROWS = [{"path": "bundled:preferences"}]


@pytest.mark.parametrize("fast", [True, False])
def test_dtype_auto_is_settled_by_what_the_machine_does_fast(fast, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(settings, "bfloat16_is_fast", lambda device: asked.append(device) or fast)
    config = SFTConfig(model="tiny", out=tmp_path, data=ROWS, device="cpu", dtype="auto")
    assert config.dtype == ("bfloat16" if fast else "float32")
    assert config.model_dump()["dtype"] == config.dtype, "config.yaml says what was taken"
    assert asked == ["cpu"]
    judged = EvalConfig(out=tmp_path, data=ROWS, baseline="tiny", device="cpu", dtype="auto")
    assert judged.dtype == config.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_named_stays(dtype, tmp_path):
    assert SFTConfig(model="tiny", out=tmp_path, data=ROWS, dtype=dtype).dtype == dtype


def test_freezing_the_embedding_beside_the_layers_above_it_is_refused(tmp_path):
    shared = {"model": "tiny", "out": tmp_path, "data": ROWS, "freeze_layers": 1}
    assert SFTConfig(**shared).freeze_layers == 1
    with pytest.raises(ValueError, match="freeze_embeddings has no effect with freeze_layers 1"):
        SFTConfig(**shared, freeze_embeddings=True)
    del shared["freeze_layers"]
    with pytest.raises(ValueError, match="freeze_embeddings has no effect with lora"):
        SFTConfig(**shared, freeze_embeddings=True, lora={"rank": 2})
