"""What a PPO iteration costs against prompts, length of replies and model size.

    python benchmarks/scaling.py [--full] [--only prompts|length|size] [--rounds 5]

Random weights, everything else as in `ppo_iteration.py`. One sweep at a time: all its runs are
loaded at once and take turns. Prints the seconds, the exponent (slope of log time over log size),
and the ratio of each doubling; for length also how much the quadratic part of attention
allows: FLOPs of the longer over FLOPs of the shorter, with attention and without.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from common import HERE, exponent, in_turn, iteration_flops, summary, text, workers, write_result
from ppo_iteration import scorer
from shapes import SHAPES, random_model

SWEEPS = {
    "prompts": [("8M", count, 32, 32) for count in (8, 16, 32, 64)],
    "length": [("8M", 16, 32, new) for new in (32, 96, 224)],
    "size": [(name, 16, 32, 32) for name in ("0.5M", "2M", "8M", "33M")],
}
"""Model, prompts, tokens of a prompt, new tokens; whole rows double in `length`."""
FULL = {
    "prompts": [("33M", count, 32, 32) for count in (8, 16, 32, 64, 128)],
    "length": [("33M", 16, 32, new) for new in (32, 96, 224, 480, 992)],
    "size": [(name, 16, 32, 32) for name in ("0.5M", "2M", "8M", "33M", "135M", "360M")],
}


def sizes_of(sweep, runs):
    """What the sweep varies."""
    if sweep == "size":
        return [SHAPES[model].parameters for model, *_ in runs]
    return [count if sweep == "prompts" else prompt + new for _, count, prompt, new in runs]


def measure(sweep, runs, given):
    """Seconds of an iteration of each run."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for model, count, prompt, new in runs:
            place = Path(folder) / model
            if not place.exists():
                random_model(SHAPES[model], place)
            argv = [sys.executable, HERE / "ppomax_worker.py", "--model", place]
            argv += ["--reward", scorer(place, Path(folder) / f"scorer {model}")]
            argv += ["--prompts", count, "--prompt", prompt, "--new", new]
            argv += ["--dtype", given.dtype, "--micro-tokens", 4096]
            commands[f"{model} {count} x ({prompt}+{new})"] = argv
        if sweep == "size" and given.full:  # the largest do not fit beside each other
            return {name: alone({name: argv}, given)[name] for name, argv in commands.items()}
        return alone(commands, given)


def alone(commands, given):
    """One group of runs in turn."""
    with workers(**commands) as running:
        answers = in_turn(running, given.rounds, warm=2)
    return {name: [row["seconds"] for row in rows] for name, rows in answers.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="up to 360M and 1024 tokens")
    parser.add_argument("--only", choices=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    found = {}
    for sweep, runs in (FULL if given.full else SWEEPS).items():
        if given.only not in (None, sweep):
            continue
        seconds = measure(sweep, runs, given)
        medians = [summary(values)["median"] for values in seconds.values()]
        work = [iteration_flops(SHAPES[model], *rest)["whole"] for model, *rest in runs]
        sizes = sizes_of(sweep, runs)
        ratios = [later / earlier for earlier, later in itertools.pairwise(medians)]
        flops = [later / earlier for earlier, later in itertools.pairwise(work)]
        slope = exponent(sizes, medians)
        print(f"{sweep}: time grows as its power {slope:.2f} (work: {exponent(sizes, work):.2f})")
        for (name, values), size in zip(seconds.items(), sizes, strict=True):
            print(f"  {size:>9} {name:<22} {text(summary(values), digits=3)}")
        if sweep != "size":
            pairs = zip(ratios, flops, strict=True)
            steps = ", ".join(f"{ratio:.2f} (work {most:.2f})" for ratio, most in pairs)
            print(f"  each doubling: {steps}", flush=True)
        found[sweep] = {
            "sizes": sizes,
            "seconds": {name: summary(values) for name, values in seconds.items()},
            "exponent": slope,
            "ratios": ratios,
            "work_ratios": flops,
        }
    name = "scaling" + "_full" * given.full + (f"_{given.only}" if given.only else "")
    write_result(name, {"dtype": given.dtype, "sweeps": found})


if __name__ == "__main__":
    main()
