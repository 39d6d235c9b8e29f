"""Libraries that only evaluation needs, imported when they are: each absence names its pip line."""

import importlib
from typing import Any

from ppomax.errors import ConfigError


def need(module: str, purpose: str) -> Any:  # noqa: ANN401 - an untyped library
    """The module of a library of the `eval` extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {module.partition('.')[0]} ({error}): "
            "python -m pip install 'ppomax[eval]'"
        ) from None
