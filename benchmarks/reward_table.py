"""Reward models with and without imitation, with and without SFT first: one command, one table.

    python benchmarks/reward_table.py --data hh_helpful.jsonl hh_harmless.jsonl oasst_zh.jsonl \\
        --out runs/reward-table [--recipe hh-reward] [key=value ...]

Trains SFT once and four reward models (lm_coef 0 and 1, from SFT and from the base model) on the
recipe, then judges all four on the held-out prompts beside the baselines. Hours on two CPU cores
with SmolLM2-135M; `model=tiny max_length=500 reward.max_steps=2 sft.max_steps=2` tries the path in
minutes. Finished stages are kept, so a stopped run goes on where it stood.
Writes OUT/report.json and OUT/report.html.
"""

import argparse
import sys
from pathlib import Path

from ppomax.eval.reward import evaluate_reward
from ppomax.evaluations import write_reward_evaluation
from ppomax.pipeline import run_recipe
from ppomax.recipe import load_recipe


def say(text):
    print(text, file=sys.stderr, flush=True)


def trained(recipe, out, stage, overrides):
    """The export of one stage, trained unless it stands there already."""
    settings = load_recipe(recipe, [f"out={out}", *overrides])
    say(f"{out}: {stage}")
    resume = (Path(out) / "config.yaml").exists()
    run_recipe(settings, only=stage, resume=resume, say=say)
    return str(Path(out) / stage / "export")


def cell(row):
    return (
        "–"
        if row is None
        else f"{row['accuracy']:.3f} [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]"
    )


def gain(row):
    if row is None or row["ci95"] is None:
        return "–"
    low, high = row["ci95"]
    return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" + (" *" if low > 0 else "")


def table(found, names):
    """Markdown: each model and subset, its accuracy, and its gain over every baseline."""
    rules = list(found["models"][0]["baselines"])
    lines = [
        "| model | pairs | n | accuracy, 95% | " + " | ".join(f"− {rule}" for rule in rules) + " |",
        "|---" * (4 + len(rules)) + "|",
    ]
    for name, model in zip(names, found["models"], strict=True):
        groups = [("", "all", model["accuracy"])]
        groups += [(row["column"], row["value"], row) for row in model["subsets"]]
        gains = {(r["column"], r["value"], r["baseline"]): r for r in model["differences"]}
        for column, value, row in groups:
            cells = [gain(gains.get((column, value, rule))) for rule in rules]
            parts = [name, f"{column} {value}".strip(), str(row["n"]), cell(row), *cells]
            lines.append("| " + " | ".join(parts) + " |")
    lines += ["", "A star: the interval of the gain leaves out zero.", ""]
    lines += ["| baseline | accuracy, 95% |", "|---|---|"]
    lines += [f"| {rule} | {cell(found['models'][0]['baselines'][rule])} |" for rule in rules]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="preference files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="hh-reward")
    parser.add_argument("overrides", nargs="*", help="key=value, as on the command line")
    settings = parser.parse_intermixed_args()
    files = ", ".join(f'"{path}"' for path in settings.data)
    shared = [f"data=[{files}]", *settings.overrides]
    recipe = load_recipe(settings.recipe, [f"out={settings.out}", *shared])
    base = recipe.sft.model
    sft = trained(settings.recipe, settings.out / "sft-first", "sft", shared)
    starts = {"base": base, "SFT": sft}
    models = {}
    for start, model in starts.items():
        for lm_coef in (0, 1):
            out = settings.out / f"{start.lower()}-lm{lm_coef}"
            own = [f"reward.model={model}", f"reward.lm_coef={lm_coef}"]
            name = f"{start}, lm_coef {lm_coef}"
            models[name] = trained(settings.recipe, out, "reward", [*shared, *own])
    found = evaluate_reward(
        list(models.values()),
        settings.data,
        dtype=recipe.reward.dtype,
        max_length=recipe.reward.max_length,
        heldout=recipe.reward.heldout,
        language_model=base,
    )
    write_reward_evaluation(found, settings.out)
    print("\n".join(table(found, list(models))))
    for row in found["comparisons"]:
        if not row["column"]:
            print(f"\n{row['first']} − {row['second']}: {gain(row)}, McNemar p {row['p']:.3g}")


if __name__ == "__main__":
    main()
