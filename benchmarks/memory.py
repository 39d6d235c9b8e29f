"""Peak memory of PPO runs against what `ppomax plan` said, on four shapes.

    python benchmarks/memory.py [--only NAME]

Each run is a process of its own (two iterations of the trainer; its largest resident memory, on
CUDA what torch held). Shapes are chosen so that another part is the largest in each: weights and
moments, activations of long rows, the vocabulary, and nothing kept for backward (checkpointing).
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from common import HERE, Worker, say, write_result
from ppo_iteration import scorer
from shapes import SHAPES, random_model

from ppomax.models.names import resolve

CASES = {
    "weights": ("smollm2-135m", ["--prompts", 8, "--prompt", 36, "--new", 28]),
    "activations": ("8M", ["--prompts", 32, "--prompt", 32, "--new", 160]),
    "long": ("2M", ["--prompts", 16, "--prompt", 32, "--new", 480]),
    "checkpointing": ("33M", ["--prompts", 16, "--prompt", 32, "--new", 96, "--checkpointing"]),
}
MICRO_TOKENS = 8192
"""The product's default, so that the micro-batch is the whole rollout here."""


def measure(name, model, sizes):
    """Peak and plan of one case, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = model if model == "smollm2-135m" else random_model(SHAPES[model], place / "model")
        source = resolve(str(source))
        argv = [sys.executable, HERE / "ppomax_worker.py", "--model", source, "--plan"]
        argv += ["--reward", scorer(source, place / "scorer"), "--micro-tokens", MICRO_TOKENS]
        worker = Worker(name, [*argv, *sizes])
        peak = [worker.go()["peak_gb"] for _ in range(2)][-1]
        worker.close()
    plan, lines = worker.ready["plan_gb"], worker.ready["lines"]
    del lines["models"]  # it names a temporary folder
    return {"peak_gb": peak, "plan_gb": plan, "off": plan / peak - 1, "lines": lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CASES))
    given = parser.parse_args()
    found = {}
    for name, (model, sizes) in CASES.items():
        if given.only in (None, name):
            found[name] = one = measure(name, model, sizes)
            line = f"{name}: plan {one['plan_gb']:.2f} GB, peak {one['peak_gb']:.2f} GB"
            print(f"{line} ({one['off']:+.0%})", flush=True)
    worst = max(found.values(), key=lambda one: abs(one["off"]))["off"]
    print(f"plan against peak: at worst {worst:+.0%}")
    if given.only:
        say("one case alone: nothing written")
    else:
        write_result("memory", {"micro_tokens": MICRO_TOKENS, "cases": found, "worst": worst})


if __name__ == "__main__":
    main()
