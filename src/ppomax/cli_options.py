"""What several verbs of the command line share. Imports nothing heavy."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ppomax.rollout import SamplingParams

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe file, or a shipped recipe's name (demo, smoke, ...).")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: key.sub=value ...")
]
ModelArgument = Annotated[str, typer.Argument(help="Folder, hub id or short name.")]
FirstPrompts = Annotated[int | None, typer.Option(help="First so many prompts.", min=1)]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System prompt; default that of the model's training.")
]


def is_main() -> bool:
    """Whether this process talks to the user: alone, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line for the user, on stderr; rank 0 only."""
    if is_main():
        typer.echo(text, err=True)


def sampling(**options: float) -> "SamplingParams":
    """Options of a verb as sampling settings.

    Raises:
        ConfigError: one has a value that means nothing.
    """
    from ppomax.config import parse
    from ppomax.rollout import SamplingParams

    return parse(SamplingParams, options, "options")
