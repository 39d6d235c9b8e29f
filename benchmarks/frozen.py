"""A PPO iteration with the lowest blocks frozen: what that saves, and what sharing them saves.

    python benchmarks/frozen.py [--freeze 20] [--rounds 5] [--dtype float32]

SmolLM2-135M as all four models, 16 prompts of 36 tokens, 64 new tokens, one step of policy and
critic: with all 30 blocks trained, with `freeze_layers` and every model computing those blocks for
itself, and as ppomax does it, one copy and one reading for all. The three take turns in one run.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from common import HERE, in_turn, summary, text, workers, write_result
from ppo_iteration import scorer

from ppomax.models.names import resolve

PHASES = ("rollout", "score", "update")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--freeze", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=20, help="for all rounds, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    model = resolve(given.model)
    with tempfile.TemporaryDirectory() as folder:
        reward = scorer(model, Path(folder) / "scorer")
        common = [sys.executable, HERE / "ppomax_worker.py", "--model", model, "--reward", reward]
        common += ["--dtype", given.dtype, "--threads", given.threads]
        frozen = [*common, "--freeze", given.freeze]
        with workers(all=common, apart=[*frozen, "--apart"], shared=frozen) as running:
            answers = in_turn(running, given.rounds, minutes=given.minutes)
    found = {}
    for name, rows in answers.items():
        keys = ("seconds", *PHASES)
        found[name] = {key: summary([row[key] for row in rows]) for key in keys}
        found[name]["peak_gb"] = max(row["peak_gb"] for row in rows)
    shared = found["shared"]["seconds"]["median"]
    ratios = {name: found[name]["seconds"]["median"] / shared for name in ("all", "apart")}
    print(
        f"{given.freeze} blocks frozen and shared: an iteration takes {1 / ratios['apart']:.2f} of "
        f"the time without sharing, {1 / ratios['all']:.2f} of that with all blocks trained"
    )
    for name, one in found.items():
        phases = ", ".join(f"{key} {one[key]['median']:.1f}" for key in PHASES)
        print(f"{name}: {text(one['seconds'])}; {phases}; peak {one['peak_gb']:.1f} GB")
    sizes = {"model": given.model, "freeze": given.freeze, "dtype": given.dtype}
    write_result("frozen", {"sizes": sizes, "ratios": ratios, "found": found})


if __name__ == "__main__":
    main()
