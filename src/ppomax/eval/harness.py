"""EleutherAI's harness on an exported folder, where it is installed."""

from collections.abc import Sequence
from typing import Any

from ppomax.errors import ConfigError
from ppomax.eval.extras import need
from ppomax.models.names import resolve


def run_harness(
    models: dict[str, str],
    tasks: Sequence[str],
    *,
    shots: int | None,
    limit: int | None,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Results of `lm_eval.simple_evaluate` by model; JSON-ready.

    Raises:
        ConfigError: the harness is not installed or knows no such task.
    """
    package = need("lm_eval", "--lm-eval")
    results = {}
    for name, model in models.items():
        arguments = f"pretrained={resolve(model)},dtype={dtype}"
        try:
            found = package.simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                device=device,
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(f"option --lm-eval: {', '.join(tasks)}: {error}") from None
        results[name] = {
            task: {key: value for key, value in row.items() if isinstance(value, int | float | str)}
            for task, row in found["results"].items()
        }
    return {"tasks": list(tasks), "results": results}


def harness_lines(record: dict[str, Any]) -> list[str]:
    """Every number of every task, for a terminal."""
    return [
        f"{task:<40} {key:<24} {model:<24} {value}"
        for model, tasks in record["results"].items()
        for task, row in tasks.items()
        for key, value in row.items()
        if key != "alias"
    ]
