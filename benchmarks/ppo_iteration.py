"""One PPO iteration of ppomax against one of TRL: time, share of the matrix rate, memory.

    python benchmarks/ppo_iteration.py [--dtype float32] [--rounds 5] [--against …] [--alone]

The same model (SmolLM2-135M) as policy, reference, critic and reward model, the same prompts (16 of
36 tokens, from a list in ppomax_worker.py), 64 new tokens for each, one epoch, one optimizer step
of each model: 4.1 TFLOP. TRL runs in an environment of its own, made once in the cache with pip
(`trl==1.12.*` and this environment's torch and transformers), or given by `--env`. Both are loaded
at once (about 16 GB in float32) and take turns; the first two iterations of each, which take memory
for the first time, are left out. `--add` counts earlier rounds in the result file too, where one
sitting is too short for five.

On a machine with bfloat16 units `--dtype bfloat16` compares ppomax (fp32 masters, bfloat16
products) with TRL on bfloat16 weights, its only way to use the units, which rounds most of an
update away, and with TRL in float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from common import (
    HERE,
    Shape,
    in_turn,
    iteration_flops,
    matmul_rate,
    read_result,
    say,
    summary,
    text,
    workers,
    write_result,
)

from ppomax.models.names import resolve
from ppomax.models.pull import cache_dir
from ppomax.rollout.cache import opening_of

TRL = "trl==1.12.*"
PHASES = ("rollout", "score", "update")


def trl_environment(given):
    """The python of an environment with TRL, made where there is none."""
    folder = given or cache_dir(os.environ) / "benchmarks" / "trl-1.12"
    python = folder / "bin" / "python"
    if given is None and not (folder / "ready").exists():
        say(f"making an environment with {TRL} in {folder}")
        venv.create(folder, with_pip=True, clear=True)
        same = [f"{name}=={metadata.version(name)}" for name in ("torch", "transformers")]
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL, *same], check=True)
        (folder / "ready").touch()
    return python


def scorer(model, place):
    """The model with a head of one number, as a sequence classifier; critic and reward model."""
    if (place / "config.json").exists():
        return place
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    found = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    found.score.weight.data.normal_(std=found.config.hidden_size**-0.5)
    found.save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


def report(answers, flops, rate):
    """Medians of each, and what share of the matrix rate they come to."""
    found = {}
    for name, rows in answers.items():
        one = {"seconds": summary([row["seconds"] for row in rows]), "rows": rows}
        one["peak_gb"] = max(row["peak_gb"] for row in rows)
        one["roofline"] = {"whole": flops["whole"] / one["seconds"]["median"] / rate["best"]}
        for phase in PHASES:
            if phase in rows[0]:
                one[phase] = summary([row[phase] for row in rows])
                one["roofline"][phase] = flops[phase] / one[phase]["median"] / rate["best"]
        if all("rate" in row for row in rows):
            one["beside"] = {
                "rate": summary([row["rate"] for row in rows]),
                "whole": _share(flops["whole"], rows, "seconds"),
                **{key: _share(flops[key], rows, key) for key in PHASES if key in rows[0]},
            }
        if name == "ppomax":  # what it computes, less than what it saves others to compute
            one["computed"] = {
                phase: (flops[phase] - flops["kept"]) / seconds["median"] / rate["best"]
                for phase, seconds in (("whole", one["seconds"]), ("update", one["update"]))
            }
        found[name] = one
    return found


def _share(flops, rows, key):
    """In the median, of the rate that was measured beside each."""
    return statistics.median(flops / row[key] / row["rate"] for row in rows)


def table(found, rate):
    """For the terminal, ratios first."""
    lines = []
    mine = found["ppomax"]["seconds"]["median"]
    for name, one in found.items():
        if name != "ppomax":
            ratio = mine / one["seconds"]["median"]
            lines.append(f"iteration: ppomax takes {ratio:.2f} of the time of {name}")
    for name, one in found.items():
        shares = ", ".join(f"{phase} {share:.0%}" for phase, share in one["roofline"].items())
        lines.append(
            f"{name}: {text(one['seconds'])}; of the matrix rate: {shares}; "
            f"peak {one['peak_gb']:.1f} GB"
        )
        if "beside" in one:
            shares = ", ".join(
                f"{phase} {share:.0%}" for phase, share in one["beside"].items() if phase != "rate"
            )
            given = one["beside"]["rate"]
            lines.append(
                f"{name}: of the rate measured beside each iteration, {given['median'] / 1e9:.0f} "
                f"GFLOP/s ({given['min'] / 1e9:.0f} to {given['max'] / 1e9:.0f}): {shares}"
            )
    shares = ", ".join(
        f"{phase} {share:.0%}" for phase, share in found["ppomax"]["computed"].items()
    )
    lines.append(f"ppomax, less the forwards that scoring keeps for the update: {shares}")
    return [*lines, f"matrix rate: {rate['best'] / 1e9:.0f} GFLOP/s in {rate['dtype']}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=36)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=20, help="for all rounds, at most")
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--env", type=Path, help="an environment that has TRL")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=["float32", "bfloat16"],
        help="TRL's weights; with bfloat16 both, which need 28 GB: on less, one and then --add",
    )
    parser.add_argument("--alone", action="store_true", help="ppomax only")
    parser.add_argument("--add", action="store_true", help="to the rounds in the result file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = resolve(given.model)
    shape = Shape.of(model)
    name = f"ppo_iteration_{given.dtype}" + "_alone" * given.alone
    with tempfile.TemporaryDirectory() as folder:
        reward = scorer(model, Path(folder) / "scorer")
        ids = Path(folder) / "ids.json"
        both = ["--model", model, "--reward", reward, "--new", given.new]
        both += ["--threads", given.threads]
        mine = [sys.executable, HERE / "ppomax_worker.py", *both, "--dtype", given.dtype]
        mine += ["--prompts", given.prompts, "--prompt", given.prompt, "--ids", ids]
        mine += ["--micro-tokens", given.micro_tokens]
        commands = {"ppomax": mine}
        if not given.alone:
            python = trl_environment(given.env)
            trl = [python, HERE / "trl_ppo.py", *both, "--ids", ids, "--dtype"]
            both_dtypes = ["float32", "bfloat16"] if given.dtype == "bfloat16" else ["float32"]
            against = given.against or both_dtypes
            if "float32" in against:
                commands["trl fp32"] = [*trl, "float32"]
            if "bfloat16" in against:
                commands["trl bf16 weights"] = [*trl, "bfloat16"]
        with workers(**commands) as running:
            products = shape.products(given.prompts * (given.prompt + given.new))
            rate = matmul_rate(given.dtype, products)
            answers = in_turn(
                running,
                given.rounds,
                warm=2,
                minutes=given.minutes,
                beside=lambda: matmul_rate(given.dtype, products)["best"],
            )
        opening = len(opening_of(json.loads(ids.read_text(encoding="utf-8"))))
        flops = iteration_flops(shape, given.prompts, given.prompt, given.new, opening=opening)
        for row in chain(*answers.values()):
            rate["best"] = max(rate["best"], row["rate"])
        installed = {worker.name: worker.ready for worker in running.values()}
    before = read_result(name) if given.add else None
    for who, one in (before or {"found": {}})["found"].items():
        answers[who] = one["rows"] + answers.get(who, [])
        rate["best"] = max(rate["best"], before["rate"]["best"])
    found = report(answers, flops, rate)
    for line in table(found, rate):
        print(line, flush=True)
    sizes = {key: getattr(given, key) for key in ("prompts", "prompt", "new", "micro_tokens")}
    write_result(
        name,
        {
            "sizes": {"model": given.model, **sizes},
            "flops": flops,
            "rate": rate,
            "found": found,
            "versions": installed,
        },
    )


if __name__ == "__main__":
    main()
