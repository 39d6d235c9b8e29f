"""The verbs of `ppomax eval`."""

from pathlib import Path
from typing import Annotated

import typer

from ppomax.cli_options import FirstPrompts, sampling, say
from ppomax.errors import ConfigError
from ppomax.visible import visible

eval_app = typer.Typer(help="Judge models.", no_args_is_help=True)


@eval_app.command("reward")
def eval_reward(
    models: Annotated[
        list[str], typer.Argument(help="Reward-model folders or hub ids; several are compared.")
    ],
    data: Annotated[list[str], typer.Option(help="Preference file; may be given several times.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the report; default the current one.")
    ] = Path(),
    dtype: str = "float32",
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest dialogue; default 1024, or the models' positions if fewer."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First so many pairs.", min=1)] = None,
    heldout: Annotated[
        float | None,
        typer.Option(help="Only the pairs that training holds out with this share."),
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
    from ppomax.evaluations import check_folder, write_reward_evaluation

    check_folder(out)
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
    for line in write_reward_evaluation(found, out):
        typer.echo(visible(line))


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
    limit: FirstPrompts = None,
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
    from ppomax.eval.judges import parse_judges
    from ppomax.evaluations import write_policy_evaluation

    drawn = sampling(
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
    )
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
        sampling=drawn,
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
    out: Annotated[
        Path, typer.Option(help="Folder of answers and report; run again to go on.")
    ] = Path("eval-capability"),
    dtype: str = "float32",
) -> None:
    """What models know: multiple choice by log-likelihood, free answers by exact match."""
    from ppomax.evaluations import write_capability_evaluation

    settings = {"data": data or [], "fewshot": fewshot or [], "shots": shots, "limit": limit}
    tasks = lm_eval.split(",") if lm_eval else []
    for line in write_capability_evaluation(models, settings, tasks, out, dtype=dtype, say=say):
        typer.echo(visible(line))
