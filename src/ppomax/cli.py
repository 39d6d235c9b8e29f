"""Command line: parse, build, call. Heavy modules are imported by the verb that needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ppomax.errors import ConfigError, PpomaxError

app = typer.Typer(
    help="From a language model and human preferences to an aligned model: SFT, reward model, "
    "PPO-max, evaluation, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data files.", no_args_is_help=True)
eval_app = typer.Typer(help="Judge models.", no_args_is_help=True)
models_app = typer.Typer(help="Embedded default models.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(models_app, name="models")

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe file, or a shipped recipe's name (demo, smoke, ...).")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: key.sub=value ...")
]


COMPUTING = {"demo", "run", "sft", "reward", "ppo", "resume", "generate", "eval"}


def say(text: str) -> None:
    """A line for the user, on stderr; rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text, err=True)


def main() -> None:
    """Entry point: errors made by users end in one line and their exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _take_huge_pages()
    sys.path.append(str(Path.cwd()))  # where `ppo.reward.callable` is looked for last
    try:
        app()
    except PpomaxError as error:
        typer.echo(f"ppomax: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("ppomax: interrupted", err=True)
        sys.exit(130)


def _take_huge_pages() -> None:
    """Start this process again with the allocator's setting, where a verb computes."""
    if not set(sys.argv[1:2]) & COMPUTING or "--help" in sys.argv:
        return
    from ppomax.process import allocator_environment

    extra = allocator_environment(os.environ)
    if extra:
        os.environ.update(extra)
        os.execv(sys.executable, [sys.executable, "-m", "ppomax.cli", *sys.argv[1:]])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    smoke: Annotated[
        bool, typer.Option(help="The same path with a tiny model and a few steps.")
    ] = False,
) -> None:
    """The main job on embedded defaults: SFT, reward model, PPO-max, evaluation, report."""
    from ppomax.pipeline import load_recipe, same_run

    fresh = load_recipe("smoke" if smoke else "demo", [f"out={out}"])
    resume = (out / "config.yaml").exists()
    if resume:
        say(f"demo: {out} exists, going on where it stood")
    _run(same_run(fresh) if resume else fresh, only=None, resume=resume)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where the directory holds this run: for requeues."),
    ] = False,
) -> None:
    """Every stage the recipe holds, in order, each fed by the one before."""
    from ppomax.pipeline import load_recipe, same_run

    found = load_recipe(recipe, overrides or [])
    resume = resume and (found.out / "config.yaml").exists()
    _run(same_run(found) if resume else found, only=None, resume=resume)


@app.command()
def sft(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """The recipe's supervised fine-tuning alone."""
    _stage("sft", recipe, overrides)


@app.command()
def reward(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """The recipe's reward model alone."""
    _stage("reward", recipe, overrides)


@app.command()
def ppo(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """The recipe's PPO alone."""
    _stage("ppo", recipe, overrides)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="Run directory.")], overrides: Overrides = None
) -> None:
    """Go on exactly where the run stood; only harmless settings may be changed."""
    from ppomax.pipeline import load_run

    _run(load_run(run, overrides or []), only=None, resume=True, asked=True)


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Resolved settings, steps, tokens, memory and disk; starts nothing."""
    from ppomax import planning
    from ppomax.config import dump
    from ppomax.pipeline import load_recipe

    found = load_recipe(recipe, overrides or [])
    typer.echo(dump(found))
    stages = planning.plan(found)
    for stage in stages:
        typer.echo(stage.text())
    for line in planning.advice(stages, planning.available_memory_gb()):
        typer.echo(line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default report.html in the first run.")
    ] = None,
) -> None:
    """Figures and tables of one or several runs, as one HTML page."""
    from ppomax.report.page import write_report

    typer.echo(write_report(runs, out or runs[0] / "report.html"))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder, hub id or short name.")],
    prompts: Annotated[str, typer.Option(help="Prompt file.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    temperature: float = 0.8,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    max_new_tokens: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    limit: Annotated[int | None, typer.Option(help="First so many prompts.", min=1)] = None,
) -> None:
    """One reply per prompt; the paper's sampling (section 6.1) by default."""
    from ppomax.config import parse
    from ppomax.eval.generate import generate_file
    from ppomax.rollout import SamplingParams

    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }
    params = parse(SamplingParams, settings, "options")
    count = generate_file(model, prompts, out, params, seed=seed, dtype=dtype, limit=limit)
    typer.echo(f"{count} replies in {out}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder, hub id or short name.")],
    temperature: float = 0.8,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    seed: int = 0,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends."""
    from ppomax.config import parse
    from ppomax.eval.generate import Chat
    from ppomax.rollout import SamplingParams

    settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    params = parse(SamplingParams, settings, "options")
    partner = Chat(model, params, seed=seed, system=system)
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        typer.echo(partner.reply(text))


@data_app.command("check")
def data_check(files: Annotated[list[str], typer.Argument(help="Data files.")]) -> None:
    """Rows, format found, defects with line numbers; exit 1 if any row would be refused."""
    from ppomax.data.check import check_files, render

    found = check_files(files)
    for line in render(found):
        typer.echo(line)
    if found.refused:
        raise typer.Exit(1)


@eval_app.command("reward")
def eval_reward(
    model: Annotated[str, typer.Argument(help="Reward-model folder or hub id.")],
    data: Annotated[list[str], typer.Option(help="Preference file; may be given several times.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default the current one.")] = None,
    dtype: str = "float32",
    max_length: int = 1024,
    limit: Annotated[int | None, typer.Option(help="First so many pairs.", min=1)] = None,
    heldout: Annotated[
        float | None, typer.Option(help="Only the pairs that training holds out with this share.")
    ] = None,
) -> None:
    """Accuracy with intervals, calibration, length bias, worst pairs: a report as JSON and HTML."""
    from ppomax.pipeline import write_reward_evaluation

    for line in write_reward_evaluation(
        model, data, out or Path(), dtype=dtype, max_length=max_length, limit=limit, heldout=heldout
    ):
        typer.echo(line)


@models_app.command("pull")
def models_pull(name: Annotated[str, typer.Argument(help="smollm2-135m or tiny.")]) -> None:
    """Fetch an embedded default model into the cache."""
    from ppomax.models.pull import cache_dir, pull

    typer.echo(pull(name, cache=cache_dir(os.environ), progress=say))


def _stage(name: str, recipe: str, overrides: list[str] | None) -> None:
    from ppomax.pipeline import load_recipe

    _run(load_recipe(recipe, overrides or []), only=name, resume=False)


def _run(recipe: object, *, only: str | None, resume: bool, asked: bool = False) -> None:
    from ppomax.pipeline import Recipe, run_recipe

    if not isinstance(recipe, Recipe):
        raise ConfigError("not a recipe")
    if not resume and os.environ.get("RANK", "0") == "0":
        from ppomax import planning

        for stage in planning.plan(recipe, only):
            say(stage.text())
    done = run_recipe(recipe, only=only, resume=resume, asked=asked, say=say)
    say("")
    say(f"report: {done.report}")
    for name in ("ppo", "sft"):
        folder = done.out / name / "export"
        if folder.exists():
            say(f"next:   ppomax chat {folder}")
            break


if __name__ == "__main__":
    main()
