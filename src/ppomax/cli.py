"""Command line: parse, build, call. Heavy modules are imported by the verb that needs them."""

import errno
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppomax.cli_eval import eval_app
from ppomax.cli_options import (
    FirstPrompts,
    ModelArgument,
    Overrides,
    RecipeArgument,
    SystemPrompt,
    is_main,
    sampling,
    say,
)
from ppomax.errors import ConfigError, DataError, PpomaxError
from ppomax.visible import visible

if TYPE_CHECKING:
    from ppomax.recipe import Recipe

app = typer.Typer(
    help="From a language model and human preferences to an aligned model: SFT, reward model, "
    "PPO-max, evaluation, report.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data files.", no_args_is_help=True)
models_app = typer.Typer(help="Embedded default models.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(models_app, name="models")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ppomax {metadata.version('ppomax')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and leave."),
    ] = False,
) -> None:
    """What stands before any command."""


COMPUTING = {"demo", "run", "sft", "reward", "ppo", "resume", "generate", "eval"}


def main() -> None:
    """Entry point: errors made by users end in one line and their exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # retries are not the user's matter
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.path[:1] in ([""], [str(Path.cwd())]):  # python -m: its files would come before Python's
        del sys.path[0]
    _set_memory_up()
    sys.path.append(str(Path.cwd()))  # where `ppo.reward.callable` is looked for last
    try:
        app()
    except PpomaxError as error:
        typer.echo(f"ppomax: {visible(str(error))}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        typer.echo(f"ppomax: {visible(f'{place}{error.strerror}')}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("ppomax: interrupted", err=True)
        sys.exit(130)


def _set_memory_up() -> None:
    """Start this process again with what it is to do with memory, where a verb computes."""
    if not set(sys.argv[1:2]) & COMPUTING or "--help" in sys.argv:
        return
    from ppomax.process import memory_environment

    extra = memory_environment(os.environ)
    if extra:
        os.environ.update(extra)
        # -P: nothing of the working directory may stand in for a module of Python's own
        os.execv(sys.executable, [sys.executable, "-P", "-m", "ppomax.cli", *sys.argv[1:]])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    smoke: Annotated[
        bool, typer.Option(help="The same path with a tiny model and a few steps.")
    ] = False,
) -> None:
    """The main job on embedded defaults: SFT, reward model, PPO-max, evaluation, report."""
    from ppomax.recipe import load_recipe, same_run

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
    from ppomax.recipe import load_recipe, same_run

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
    """Go on exactly where the run stood.

    Only harmless settings of a stage that was begun may be changed, any of one that was not.
    """
    from ppomax.recipe import load_run

    _run(load_run(run, overrides or []), only=None, resume=True, asked=True)


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Resolved settings, steps, tokens, memory and disk; starts nothing."""
    from ppomax import planning
    from ppomax.config import dump
    from ppomax.recipe import load_recipe

    found = load_recipe(recipe, overrides or [])
    typer.echo(visible(dump(found)))
    stages = planning.plan(found)
    for stage in stages:
        typer.echo(visible(stage.text()))
    devices = {getattr(found, name).device for name in found.stages()}
    device = next((name for name in sorted(devices) if name.startswith("cuda")), min(devices))
    for line in planning.advice(stages, planning.available_memory_gb(device)):
        typer.echo(visible(line))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe or preset.")] = None,
) -> None:
    """Recipes and presets that come with the package, or the text of one."""
    from ppomax.presets import shipped

    for line in shipped(name):
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
def watch(
    run: Annotated[Path, typer.Argument(help="Run directory, live or not.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option(help="Show it as it stands and leave.")] = False,
) -> None:
    """A run in the terminal: its curves as sparklines, alarms, replies."""
    from rich.console import Console

    from ppomax.report.watch import watch as show

    show(run, every=every, console=Console(), once=once)


@app.command()
def generate(
    model: ModelArgument,
    prompts: Annotated[str, typer.Option(help="Prompt file.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; stopped, the same call goes on.")],
    temperature: float = 0.8,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    max_new_tokens: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    limit: FirstPrompts = None,
    system: SystemPrompt = None,
) -> None:
    """One reply per prompt; the paper's sampling (section 6.1) by default."""
    from ppomax.eval.writing import generate_file

    params = sampling(
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
    )
    count = generate_file(
        model, prompts, out, params, seed=seed, dtype=dtype, limit=limit, system=system
    )
    typer.echo(f"{count} replies in {out}")


@app.command()
def chat(
    model: ModelArgument,
    temperature: float = 0.8,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    seed: int = 0,
    system: SystemPrompt = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends."""
    from ppomax.eval.generate import Chat

    params = sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    partner = Chat(model, params, seed=seed, system=system)
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "").strip()
            text.encode()  # in the C locale a byte that is not UTF-8 becomes a lone surrogate
        except EOFError:
            return
        except UnicodeError:
            raise DataError("standard input: a line is not UTF-8; give text in UTF-8") from None
        if not text:
            return
        typer.echo(partner.reply(text))


@app.command()
def annotate(
    pairs: Annotated[Path, typer.Argument(help="Pair file (JSONL).")],
    out: Annotated[Path, typer.Option(help="Vote file; gone on with if it is there.")],
    export: Annotated[
        Path | None,
        typer.Option(help="Write preference pairs made of the votes to this file, and end."),
    ] = None,
    quota: Annotated[int | None, typer.Option(help="Votes wanted of each pair (1).")] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on (127.0.0.1); another one gets a token."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="8765; 0 takes any free one.")] = None,
    url: Annotated[
        str | None, typer.Option(help="https://name, where a proxy in front is reached.")
    ] = None,
) -> None:
    """A page on which people compare replies, blind; their votes become preference pairs."""
    from ppomax.config import parse

    given = {"quota": quota, "host": host, "port": port, "url": url}
    settings = {name: value for name, value in given.items() if value is not None}
    if export is not None:
        from ppomax.annotate.export import export_preferences

        if settings:
            raise ConfigError(f"option {next(iter(settings))}: has no effect with --export")
        for line in export_preferences(pairs, out, export):
            typer.echo(visible(line))
        return
    try:
        from ppomax.annotate.serve import AnnotateConfig, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError('the page needs: pip install "ppomax[ui]"') from None
    config = parse(AnnotateConfig, settings, "options")
    serve(pairs, out, config, token=os.environ.get("PPOMAX_ANNOTATE_TOKEN"), say=say)


@data_app.command("check")
def data_check(
    files: Annotated[list[str], typer.Argument(help="Data files.")],
    kind: Annotated[
        str | None,
        typer.Option(help="What they are to be: preference, SFT, prompt or text; default found."),
    ] = None,
) -> None:
    """Rows, format found, defects with line numbers; exit 1 if any row would be refused."""
    from ppomax.data.check import check_files, kind_named, render

    found = check_files(files, None if kind is None else kind_named(kind))
    for line in render(found):
        typer.echo(visible(line))
    if found.refused:
        raise typer.Exit(1)


@models_app.command("pull")
def models_pull(name: Annotated[str, typer.Argument(help="smollm2-135m or tiny.")]) -> None:
    """Fetch an embedded default model into the cache."""
    from ppomax.models.pull import cache_dir, pull

    typer.echo(pull(name, cache=cache_dir(os.environ), progress=say))


def _stage(name: str, recipe: str, overrides: list[str] | None) -> None:
    from ppomax.recipe import load_recipe

    _run(load_recipe(recipe, overrides or []), only=name, resume=False)


def _run(recipe: "Recipe", *, only: str | None, resume: bool, asked: bool = False) -> None:
    from ppomax.pipeline import run_recipe

    if not resume and is_main():
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
