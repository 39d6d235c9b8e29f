"""Command line: parse, build, call. Heavy modules are imported by the verb that needs them."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ppomax.errors import ConfigError, PpomaxError
from ppomax.visible import visible

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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # retries are not the user's matter
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _take_huge_pages()
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
    system: Annotated[
        str | None, typer.Option(help="System prompt; default that of the model's training.")
    ] = None,
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
    count = generate_file(
        model, prompts, out, params, seed=seed, dtype=dtype, limit=limit, system=system
    )
    typer.echo(f"{count} replies in {out}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder, hub id or short name.")],
    temperature: float = 0.8,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    seed: int = 0,
    system: Annotated[
        str | None, typer.Option(help="System prompt; default that of the model's training.")
    ] = None,
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
            typer.echo(line)
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
def data_check(files: Annotated[list[str], typer.Argument(help="Data files.")]) -> None:
    """Rows, format found, defects with line numbers; exit 1 if any row would be refused."""
    from ppomax.data.check import check_files, render

    found = check_files(files)
    for line in render(found):
        typer.echo(visible(line))
    if found.refused:
        raise typer.Exit(1)


@eval_app.command("reward")
def eval_reward(
    models: Annotated[
        list[str], typer.Argument(help="Reward-model folders or hub ids; several are compared.")
    ],
    data: Annotated[list[str], typer.Option(help="Preference file; may be given several times.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default the current one.")] = None,
    dtype: str = "float32",
    max_length: int = 1024,
    limit: Annotated[int | None, typer.Option(help="First so many pairs.", min=1)] = None,
    heldout: Annotated[
        float | None, typer.Option(help="Only the pairs that training holds out with this share.")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Column to give numbers by, beside lang, kind, source.")
    ] = None,
    lm: Annotated[
        str,
        typer.Option(
            help="Language model whose likelihood of an answer is a baseline; base: what the first "
            "model started from; none: leave it out."
        ),
    ] = "base",
    gold: Annotated[
        str | None,
        typer.Option(help="Second reward model, the judge of a best-of-n curve."),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(help="File of several replies to each prompt; default the pairs' answers."),
    ] = None,
) -> None:
    """Accuracy with intervals, calibration, length bias, worst pairs: a report as JSON and HTML."""
    from ppomax.eval.reward import evaluate_reward
    from ppomax.pipeline import write_reward_evaluation

    if candidates and gold is None:
        raise ConfigError("option candidates: has no effect without --gold, who judges them")
    found = evaluate_reward(
        models,
        data,
        dtype=dtype,
        max_length=max_length,
        limit=limit,
        heldout=heldout,
        by=by or (),
        language_model=None if lm == "none" else lm,
        gold=gold,
        candidates=candidates or (),
    )
    for line in write_reward_evaluation(found, out or Path()):
        typer.echo(line)


@eval_app.command("policy")
def eval_policy(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models or files of replies {id, response}; the first is the baseline."
        ),
    ],
    prompts: Annotated[list[str], typer.Option(help="Prompt file; may be given several times.")],
    judge: Annotated[
        list[str],
        typer.Option(
            help="reward:PATH, openai:BASE_URL#MODEL (key: PPOMAX_JUDGE_KEY or OPENAI_API_KEY), "
            "local:MODEL, callable:module:function, human, file:VERDICTS; may be given several "
            "times."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of replies, answers and report; run again to go on.")
    ] = Path("eval-policy"),
    rubrics: Annotated[
        Path | None,
        typer.Option(help="Folder with rubrics of your own, named helpful.en.md, ..."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say how many calls the judges would get.")] = False,
    temperature: float = 0.8,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    max_new_tokens: int = 2048,
    seed: int = 0,
    dtype: str = "float32",
    limit: Annotated[int | None, typer.Option(help="First so many prompts.", min=1)] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once (8).")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for a request (120).")] = None,
    retries: Annotated[int | None, typer.Option(help="Further tries of a request (6).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer (1024).")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Stop before more requests.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop before more is spent; needs both prices.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(help="Of a million tokens sent.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Of a million tokens written.")] = None,
) -> None:
    """Win, tie, lose of policies on the same prompts, each pair judged in both orders."""
    from ppomax.config import parse
    from ppomax.eval.judges import parse_judges
    from ppomax.pipeline import write_policy_evaluation
    from ppomax.rollout import SamplingParams

    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }
    options = {
        "concurrency": concurrency,
        "timeout": timeout,
        "retries": retries,
        "max_tokens": max_tokens,
        "max_calls": max_calls,
        "max_cost": max_cost,
        "price_in": price_in,
        "price_out": price_out,
    }
    for line in write_policy_evaluation(
        models,
        prompts,
        parse_judges(judge, options),
        out,
        sampling=parse(SamplingParams, settings, "options"),
        seed=seed,
        dtype=dtype,
        limit=limit,
        rubrics=rubrics,
        dry_run=dry_run,
        say=say,
    ):
        typer.echo(visible(line))


@eval_app.command("capability")
def eval_capability(
    models: Annotated[list[str], typer.Argument(help="Models; the first is the baseline.")],
    data: Annotated[
        list[str] | None, typer.Option(help="File of questions; may be given several times.")
    ] = None,
    fewshot: Annotated[
        list[str] | None, typer.Option(help="File of examples; may be given several times.")
    ] = None,
    shots: Annotated[int, typer.Option(help="Examples before each question.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="First so many questions.", min=1)] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of EleutherAI's harness, as mmlu,cmmlu.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("eval-capability"),
    dtype: str = "float32",
) -> None:
    """What models know: multiple choice by log-likelihood, free answers by exact match."""
    from ppomax.pipeline import write_capability_evaluation

    settings = {"data": data or [], "fewshot": fewshot or [], "shots": shots, "limit": limit}
    tasks = lm_eval.split(",") if lm_eval else []
    for line in write_capability_evaluation(models, settings, tasks, out, dtype=dtype, say=say):
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
