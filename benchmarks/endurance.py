"""Thousands of PPO iterations of a very small model: does anything grow or slow down?

    python benchmarks/endurance.py [--iterations 10000] [--rows FILE]

Measures resident memory, open files, threads and the processor time of an iteration (beside it the
time of the clock, in which other programs count too). Memory is compared between the second
hundredth and the last tenth, time by its 95th percentile between the second tenth and the last.
Limits: memory grows by less than 5%, files and threads stay, processor time drifts by less than
10%. Exit code 1 where a limit is passed.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

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
"""Most that the last tenth may be over the early part."""


class Row(NamedTuple):
    """What one iteration left, at its end."""

    clock: float
    processor: float
    """Seconds of this process, all its threads."""
    memory: float
    """Resident, MB."""
    files: int
    threads: int


def score(prompts: Any, responses: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(response)) for response in responses]


def settings(root: Path, iterations: int) -> PPOConfig:
    """Two short replies an iteration; what has state is on: monitors, LM text, a buffer of two."""
    texts = [f"What of {word}?" for word in WORDS]
    tokenizer = tiny_tokenizer(texts * 4, vocab_size=280)
    model = tiny_model(
        vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, intermediate=16
    )
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (root / "prompts.jsonl").write_text(rows, encoding="utf-8")
    lines = "".join(json.dumps({"text": f"{text} " * 8}) + "\n" for text in texts)
    (root / "text.jsonl").write_text(lines, encoding="utf-8")
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
            "ptx": {"data": str(root / "text.jsonl"), "tokens": 16, "length": 16},
            "buffer_iterations": 2,
            "optim": adam,
            "critic_optim": adam,
            "threads": 1,
            "checkpoint": {"every": 100},
            "log": {"samples_every": 100},
        },
    )


def now() -> Row:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Row(
        time.monotonic(),
        time.process_time(),
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(list(Path("/proc/self/fd").iterdir())),
        len(list(Path("/proc/self/task").iterdir())),
    )


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[int(0.95 * len(values))]


def seconds(rows: list[Row], column: int) -> list[float]:
    """Each iteration's, by one of the two clocks."""
    return [after[column] - before[column] for before, after in itertools.pairwise(rows)]


def judge(rows: list[Row]) -> bool:
    """Whether nothing grew; prints the figures."""
    hundredth, tenth = max(1, len(rows) // 100), max(2, len(rows) // 10)
    young, early, late = rows[hundredth : 2 * hundredth], rows[tenth : 2 * tenth], rows[-tenth:]
    memory = [max(row.memory for row in part) for part in (young, late)]
    drift = {}
    for name, column in (("processor", 1), ("clock", 0)):
        found = [p95(seconds(part, column)) for part in (early, late)]
        drift[name] = found[1] / found[0]
        print(
            f"p95 of an iteration, {name}: {found[0] * 1e3:.1f} ms in the second tenth, "
            f"{found[1] * 1e3:.1f} ms in the last ({drift[name] - 1:+.1%})"
        )
    held = [{(row.files, row.threads) for row in part} for part in (young, late)]
    print(
        f"{len(rows)} iterations, {rows[-1].clock - rows[0].clock:.0f} s of the clock, "
        f"{rows[-1].processor - rows[0].processor:.0f} s of the processor; resident "
        f"{memory[0]:.1f} MB in the second hundredth, {memory[1]:.1f} MB in the last tenth "
        f"({memory[1] / memory[0] - 1:+.1%}); (files, threads) {sorted(held[0])} then "
        f"{sorted(held[1])}"
    )
    good = memory[1] <= memory[0] * MEMORY and drift["processor"] <= TIME
    return good and held[1] <= held[0]


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--rows", type=Path, help="leave what was measured here, as JSON lines")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["endurance"] = sys.modules["__main__"]
    rows: list[Row] = []
    log = StageRun.log

    def measured(run: StageRun, *args: Any, **keywords: Any) -> None:
        log(run, *args, **keywords)
        rows.append(now())

    StageRun.log = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        ppo.train_ppo(settings(Path(folder), chosen.iterations))
    if chosen.rows is not None:
        lines = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
        chosen.rows.write_text(lines, encoding="utf-8")
    return 0 if judge(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
