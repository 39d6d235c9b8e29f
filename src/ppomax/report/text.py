"""Text for a page: hidden characters made visible, long text cut, numbers rounded.

Prompts and replies are other people's text. Escaping of HTML is the template engine's; here is
what escaping leaves: terminal escapes, direction marks, invisible and invalid characters.
"""

import math
from typing import Any

from markupsafe import Markup

from ppomax.visible import visible as visible


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, saying how many more there are."""
    more = len(text) - limit
    return text if more <= 0 else f"{text[:limit]}… ({more:,} more characters)"


def number(value: float | int | None) -> str:
    """A number for a reader: four significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return visible(str(value))
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.1f}" if size >= 1000 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage."""
    return "–" if share is None else f"{100 * share:.1f}%"


def between(interval: tuple[float, float] | None, form: str = "signed") -> str:
    """An interval as `low to high`; `form` is `signed` or `percent`."""
    show = percent if form == "percent" else signed
    return "–" if interval is None else f"{show(interval[0])} to {show(interval[1])}"


def duration(seconds: float | None) -> str:
    """Seconds as `1 h 02 min`, `3 min 05 s` or `4.2 s`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def shown(value: Any) -> Any:  # noqa: ANN401 - whatever a template holds
    """What a template prints for a value: applied to every expression, before escaping."""
    if isinstance(value, Markup):
        return value
    if value is None or isinstance(value, int | float):
        return number(value)
    return visible(value) if isinstance(value, str) else value
