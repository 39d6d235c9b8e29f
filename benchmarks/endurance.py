"""Thousands of PPO iterations of a very small model: does anything grow or slow down?

    python benchmarks/endurance.py [--iterations 10000]

Measures resident memory, open files and the time of an iteration, which is compared between the
second tenth and the last by its 95th percentile. Limits: memory grows by less than 5%, files stay,
time drifts by less than 10%. Exit code 1 where a limit is passed.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from ppomax.config import parse
from ppomax.models.tiny import tiny_model, tiny_tokenizer
from ppomax.train import ppo
from ppomax.train.loop import StageRun
from ppomax.train.ppo_config import PPOConfig

WORDS = ["tea", "rain", "a duck", "the moon", "old songs", "bread", "salt", "a slow train"]
MEMORY, TIME = 1.05, 1.10
"""Most that the last tenth may be over the second."""


def score(prompts: Any, responses: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(response)) for response in responses]


def settings(root: Path, iterations: int) -> PPOConfig:
    """Two short replies an iteration; everything that has state is on."""
    texts = [f"What of {word}?" for word in WORDS]
    tokenizer = tiny_tokenizer(texts * 4, vocab_size=280)
    model = tiny_model(
        vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, intermediate=16
    )
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (root / "prompts.jsonl").write_text(rows, encoding="utf-8")
    adam = {"lr": 1e-5}
    return parse(
        PPOConfig,
        {
            "model": str(root / "model"),
            "out": str(root / "run"),
            "data": str(root / "prompts.jsonl"),
            "iterations": iterations,
            "rollout_size": 2,
            "minibatch_size": 2,
            "max_length": 64,
            "max_prompt": 40,
            "sampling": {"max_new_tokens": 2},
            "reward": {"callable": "endurance:score"},
            "critic": "policy",
            "critic_pretraining": None,
            "kl": {"coef": 0.05, "target_per_token": 0.01},
            "optim": adam,
            "critic_optim": adam,
            "threads": 1,
            "checkpoint": {"every": 100},
            "log": {"samples_every": 100},
        },
    )


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    iterations = parser.parse_args().iterations
    torch.set_num_threads(1)
    sys.modules["endurance"] = sys.modules["__main__"]
    seen: list[tuple[float, float, int]] = []
    log = StageRun.log

    def measured(run: StageRun, *args: Any, **keywords: Any) -> None:
        log(run, *args, **keywords)
        files = len(list(Path("/proc/self/fd").iterdir()))
        seen.append((time.monotonic(), resident(), files))

    StageRun.log = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        ppo.train_ppo(settings(Path(folder), iterations))
    tenth = max(2, len(seen) // 10)
    times = [after[0] - before[0] for before, after in itertools.pairwise(seen)]
    early, late = sorted(times[tenth : 2 * tenth]), sorted(times[-tenth:])
    p95 = [part[int(0.95 * len(part))] for part in (early, late)]
    memory = [max(row[1] for row in part) for part in (seen[tenth : 2 * tenth], seen[-tenth:])]
    files = [part[-1][2] for part in (seen[tenth : 2 * tenth], seen)]
    print(
        f"{len(seen)} iterations, {seen[-1][0] - seen[0][0]:.0f} s; second tenth and last: "
        f"resident {memory[0]:.0f} and {memory[1]:.0f} MB ({memory[1] / memory[0] - 1:+.1%}), "
        f"open files {files[0]} and {files[1]}, p95 of an iteration {p95[0] * 1e3:.1f} and "
        f"{p95[1] * 1e3:.1f} ms ({p95[1] / p95[0] - 1:+.1%})"
    )
    good = memory[1] <= memory[0] * MEMORY and files[0] == files[1] and p95[1] <= p95[0] * TIME
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
