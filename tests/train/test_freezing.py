"""`freeze_layers` in every stage: what lies below stays, and is not in a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from ppomax import checkpoint
from ppomax.models.names import resolve
from ppomax.train.ppo import train_ppo
from ppomax.train.reward import train_reward
from ppomax.train.sft import train_sft

STAGES = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}
SAVED = {"sft": ["policy"], "reward": ["reward"], "ppo": ["policy", "critic"]}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_trains_the_blocks_above_alone(stage, lora, small, tmp_path):
    run = STAGES[stage](small(stage, tmp_path / "run", {"freeze_layers": 1, "lora": lora}))
    saved = checkpoint.latest(run / "checkpoints")
    for name in SAVED[stage]:
        trained = saved.tensors(name)
        assert any("layers.1." in key for key in trained)
        assert not any("layers.0." in key or "embed" in key for key in trained)
    before = load_file(f"{resolve('tiny')}/model.safetensors")
    after = load_file(run / "export" / "model.safetensors")
    block = {key: value for key, value in after.items() if "layers.0." in key or "embed" in key}
    assert len(block) > 5
    assert all(torch.equal(value, before[key]) for key, value in block.items())
    changed = [key for key in after if key in before and not torch.equal(after[key], before[key])]
    assert any("layers.1." in key for key in changed)
