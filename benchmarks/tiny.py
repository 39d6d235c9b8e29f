"""A tiny model's PPO iteration: ppomax against the loop one would write with `transformers`.

    python benchmarks/tiny.py [--rounds 15] [--dtype float32]

Hidden 128, 4 layers, random weights; 64 prompts of 16 tokens, 32 new tokens each, one epoch, one
step of policy and critic. Both are loaded at once and take turns.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from common import HERE, in_turn, iteration_flops, matmul_rate, summary, text, workers, write_result
from ppo_iteration import report, scorer
from shapes import SHAPES, random_model

from ppomax.rollout.cache import opening_of

PHASES = ("rollout", "score", "update")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shape = SHAPES["tiny"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = random_model(shape, place / "model")
        both = ["--model", model, "--reward", scorer(model, place / "scorer"), "--new", given.new]
        both += ["--threads", given.threads, "--ids", place / "ids.json"]
        mine = [sys.executable, HERE / "ppomax_worker.py", *both, "--dtype", given.dtype]
        mine += ["--prompts", given.prompts, "--prompt", given.prompt, "--micro-tokens", 8192]
        plain = [sys.executable, HERE / "plain_ppo.py", *both]
        with workers(ppomax=mine, plain=plain) as running:
            rate = matmul_rate("float32", shape.products(given.prompts * 48))
            answers = in_turn(running, given.rounds, warm=3)
        opening = len(opening_of(json.loads((place / "ids.json").read_text(encoding="utf-8"))))
        flops = iteration_flops(shape, given.prompts, given.prompt, given.new, opening=opening)
    found = report(answers, flops, rate)
    mine, plain = found["ppomax"], found["plain"]
    ratio = plain["seconds"]["median"] / mine["seconds"]["median"]
    print(f"tiny model: ppomax does {ratio:.2f} iterations for one of the plain float32 loop")
    for name, one in found.items():
        parts = ", ".join(f"{phase} {one[phase]['median'] * 1e3:.0f}" for phase in PHASES)
        print(f"{name}: {text(one['seconds'], digits=3)}; ms: {parts}")
    sizes = {key: getattr(given, key) for key in ("prompts", "prompt", "new", "dtype")}
    per_second = {
        name: summary([1 / row["seconds"] for row in rows]) for name, rows in answers.items()
    }
    for one in found.values():
        del one["rows"]
    values = {"sizes": sizes, "ratio": ratio, "flops": flops, "rate": rate, "found": found}
    write_result(f"tiny_{given.dtype}", {**values, "iterations_per_s": per_second})


if __name__ == "__main__":
    main()
