"""Curves, histograms and a reliability diagram as SVG. Knows no run, metric key or page.

Same numbers, same bytes: no date, ids from the figure's name. Lines differ in dash and marker as
well as colour, so that they can be told apart in grey print; text takes the page's colour.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from ppomax.report.text import clip, number, visible

COLORS = ("#2f7fc1", "#d9730d", "#2f9e62", "#a05fb4", "#d1495b", "#8a8420")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xxx")
INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "hatch.linewidth": 0.6,
    "lines.solid_capstyle": "round",
}
"""matplotlib settings of every figure."""
MAX_POINTS = 4000
"""Points of all lines of one figure; longer curves keep the extremes of each stretch."""


Places = list[Any]
"""matplotlib axes, from top to bottom."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One drawing, ready to stand in a page."""

    title: str
    alt: str
    """What it shows in one or two sentences, with numbers."""
    svg: Markup


class Line(NamedTuple):
    """A curve, with an optional band around it."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    """Which colour and marker."""
    dash: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def curves(
    name: str,
    title: str,
    axes: Sequence[tuple[str, list[Line]]],
    marks: Sequence[float] = (),
    xlabel: str = "step",
) -> Figure:
    """Lines over steps, one set of axes below the other; `marks` are dotted vertical lines.

    Args:
        xlabel: what the lines run over, if it is not steps.
    """

    def draw(places: Places) -> None:
        for place, (label, lines) in zip(places, axes, strict=True):
            for line in lines:
                _draw_line(place, line, limit=max(60, MAX_POINTS // len(parts)))
            for step in marks:
                place.axvline(step, color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
            place.set_ylabel(label)
            place.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
            place.margins(x=0.01)
        places[-1].set_xlabel(xlabel)
        if xlabel == "step":
            places[-1].xaxis.get_major_locator().set_params(integer=True)

    unit = xlabel.partition(" ")[0]
    parts = [_line_text(line, unit) for _, lines in axes for line in lines]
    marked = f" Dotted lines mark {len(marks)} steps with an alarm or rollback." if marks else ""
    more = f"; and {len(parts) - 12} more" if len(parts) > 12 else ""
    band = any(line.low is not None for _, lines in axes for line in lines)
    banded = " The band is the 5th to 95th percentile." if band else ""
    alt = f"{title} over {unit.removesuffix('s')}s: {'; '.join(parts[:12])}{more}.{banded}{marked}"
    legends = [[short(line.label) for line in lines] for _, lines in axes]
    return Figure(title, alt, _svg(name, title, alt, legends, draw))


def _draw_line(place: Any, line: Line, limit: int) -> None:  # noqa: ANN401 - untyped
    keep = thin(line.values, limit)
    steps, values = _drawable(line.steps, keep), _drawable(line.values, keep)
    color = COLORS[line.color % len(COLORS)]
    if line.low is not None and line.high is not None:
        low, high = _drawable(line.low, keep), _drawable(line.high, keep)
        place.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        for edge in (low, high):
            place.plot(steps, edge, color=color, linewidth=0.7, linestyle=":")
    place.plot(
        steps,
        values,
        label=short(line.label),
        color=color,
        linewidth=1.6,
        linestyle=DASHES[line.dash % len(DASHES)],
        marker=MARKERS[line.color % len(MARKERS)],
        markersize=4,
        markevery=max(1, len(steps) // 8),
    )


def _drawable(values: Sequence[float], keep: list[int]) -> NDArray[np.float64]:
    """The kept values, with gaps where there is no number an axis could show."""
    found = np.asarray(values, dtype=np.float64)[keep]
    return np.where(np.abs(found) < 1e100, found, np.nan)


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices to draw: all of a short curve; of a long one each stretch's lowest and highest."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept, found = {0, len(values) - 1}, np.asarray(values, dtype=np.float64)
    found = np.where(np.isfinite(found), found, np.nan)
    for part in np.array_split(np.arange(len(values)), max(1, limit // 2)):
        if not np.isnan(found[part]).all():
            kept |= {int(part[pick(found[part])]) for pick in (np.nanargmin, np.nanargmax)}
    return sorted(kept)


def short(label: str) -> str:
    """A label on one line, not too long for a legend."""
    return clip(" ".join(visible(label).split()), 40).lstrip("_")


def _line_text(line: Line, unit: str) -> str:
    first, last = (f"{number(line.values[i])} ({unit} {number(line.steps[i])})" for i in (0, -1))
    return f"{short(line.label)} from {first} to {last}"


def histograms(
    name: str,
    title: str,
    xlabel: str,
    sets: Sequence[tuple[str, ArrayLike, NDArray[np.float64]]],
    alt: str,
    ylabel: str = "count",
) -> Figure:
    """Outlined histograms on top of each other.

    `sets` holds label, counts and edges of each; a dotted line marks zero where it is inside.
    """

    def draw(places: Places) -> None:
        (place,) = places
        for index, (label, counts, edges) in enumerate(sets):
            color = COLORS[index % len(COLORS)]
            hatch = HATCHES[index % len(HATCHES)]
            dash = DASHES[index % len(DASHES)]
            place.stairs(counts, edges, fill=True, color=color, alpha=0.15)
            place.stairs(counts, edges, color=color, hatch=hatch, linestyle=dash, linewidth=1.4)
            place.plot([], [], color=color, linestyle=dash, label=short(label))
        if all(edges[0] < 0 < edges[-1] for _, _, edges in sets):
            place.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        place.set_xlabel(xlabel)
        place.set_ylabel(ylabel)
        place.set_ylim(bottom=0)

    legend = [short(label) for label, _, _ in sets]
    return Figure(title, alt, _svg(name, title, alt, [legend], draw))


def reliability(name: str, title: str, rows: Sequence[Mapping[str, Any]], alt: str) -> Figure:
    """Accuracy over confidence with 95% intervals, beside the diagonal of perfect calibration.

    `rows` hold `confidence`, `accuracy` and `ci95`.
    """

    def draw(places: Places) -> None:
        (place,) = places
        x, y = ([row[key] for row in rows] for key in ("confidence", "accuracy"))
        low, high = zip(*(row["ci95"] for row in rows), strict=True)
        errors = np.abs(np.array([np.subtract(y, low), np.subtract(high, y)]))
        start = min(0.5, *x)
        place.plot([start, 1], [start, 1], color=INK, linestyle=":", label=legend[0])
        place.errorbar(x, y, yerr=errors, color=COLORS[0], marker="o", capsize=3, label=legend[1])
        place.set_xlabel("confidence of the model")
        place.set_ylabel("share it is right")

    legend = ["perfectly calibrated", "with 95% interval"]
    return Figure(title, alt, _svg(name, title, alt, [legend], draw))


def _svg(
    name: str,
    title: str,
    alt: str,
    legends: Sequence[Sequence[str]],
    draw: Callable[[Places], None],
) -> Markup:
    """Run `draw` on one set of axes per legend and return an SVG element."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    style: Any = STYLE | {"svg.hashsalt": name}
    text = io.StringIO()
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Canvas()
        FigureCanvasSVG(figure)
        places = _axes(figure, [_legend_rows(labels) for labels in legends])
        draw(places)
        for place, labels in zip(places, legends, strict=True):
            if len(labels) > 1:
                place.legend(ncols=_columns(labels), loc="lower left", bbox_to_anchor=(0, 1))
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=empty)
    prefix = f"f{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return _inline(text.getvalue(), prefix, title, alt)


def _legend_rows(labels: Sequence[str]) -> int:
    return math.ceil(len(labels) / _columns(labels)) if len(labels) > 1 else 0


def _columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 26 else 1


def _axes(figure: Any, legend_rows: Sequence[int]) -> Places:  # noqa: ANN401 - matplotlib is untyped
    """Axes below each other under room for their legends, sharing the steps. In inches."""
    width, left, right, bottom = 5.2, 0.75, 0.1, 0.48
    plot = 2.0 if len(legend_rows) == 1 else 1.4
    rooms = [0.2 * rows + 0.12 for rows in legend_rows]
    height = bottom + sum(rooms) + plot * len(rooms)
    figure.set_size_inches(width, height)
    places: list[Any] = []
    top = height
    for room in rooms:
        top -= room + plot
        box = (left / width, top / height, 1 - (left + right) / width, plot / height)
        places.append(figure.add_axes(box, sharex=places[0] if places else None))
    for place in places[:-1]:
        place.tick_params(labelbottom=False)
    return places


def _inline(svg: str, prefix: str, title: str, alt: str) -> Markup:
    """The svg element alone, its ids made its own, its text in the page's colour and font."""
    start, end = svg.index("<svg"), svg.rindex("</svg>")
    head, body = svg[start:end].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' id="', f' id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = body.replace(INK, "currentColor")
    label = f"<title>{escape(visible(title))}</title><desc>{escape(visible(alt))}</desc>"
    opening = f'<svg {box.group() if box else ""} role="img" xmlns="http://www.w3.org/2000/svg">'
    return Markup(f"{opening}{label}{body}</svg>")
