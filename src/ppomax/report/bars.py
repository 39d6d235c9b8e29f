"""Bars: win, tie and lose (figures 10 and 11 of the paper) and accuracy (figure 12), as SVG."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppomax.report.drawing import COLORS, HATCHES, INK, Figure, Places, _svg, short
from ppomax.report.text import percent

SIDES = ("win", "tie", "lose")
MAX_BARS = 14
"""Groups of accuracy bars in one figure; more would be too thin to read."""
MAX_SPLITS = 6
"""Bars of win, tie and lose, each under its name."""


class Split(NamedTuple):
    """One bar of win, tie and lose."""

    label: str
    shares: tuple[float, float, float]
    num_pairs: int


def win_tie_lose_bars(name: str, title: str, bars: Sequence[Split]) -> Figure:
    """Horizontal bars of three parts each, with the percentage in every part."""
    bars = bars[:MAX_SPLITS]

    def draw(places: Places) -> None:
        (place,) = places
        heights = list(range(len(bars)))[::-1]
        left = np.zeros(len(bars))
        for part, side in enumerate(SIDES):
            widths = np.array([bar.shares[part] for bar in bars])
            color = (COLORS[2], "#9a9a9a", COLORS[4])[part]
            style = {"color": color, "alpha": 0.75, "hatch": HATCHES[part], "edgecolor": INK}
            place.barh(heights, widths, left=left, height=0.5, linewidth=0.5, label=side, **style)
            for y, x, width in zip(heights, left, widths, strict=True):
                if width >= 0.08:
                    place.text(
                        x + width / 2, y, percent(width), ha="center", va="center", fontsize=8
                    )
            left = left + widths
        place.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
        place.set_yticks([])  # names stand above their bars: beside them there is no room
        for y, bar in zip(heights, bars, strict=True):
            name = f"{short(bar.label)}, n {bar.num_pairs:,}"
            place.text(0, y + 0.27, name, ha="left", va="bottom", fontsize=7.5)
        place.set_xlim(0, 1)
        place.set_ylim(-0.4, len(bars) - 0.25)
        place.set_xlabel("share of pairs")

    parts = [
        f"{short(bar.label)} {' / '.join(percent(share) for share in bar.shares)} "
        f"of {bar.num_pairs:,}"
        for bar in bars
    ]
    alt = f"{title}, win / tie / lose: {'; '.join(parts)}."
    return Figure(title, alt, _svg(name, title, alt, [list(SIDES)], draw))


def accuracy_bars(
    name: str, title: str, groups: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Figure:
    """Accuracy of each model in each group, side by side, with 95% intervals.

    `rows` holds of each model one {accuracy, ci95} per group.
    """
    groups = list(groups)[:MAX_BARS]
    width = 0.8 / max(1, len(rows))

    def draw(places: Places) -> None:
        (place,) = places
        for index, (model, cells) in enumerate(rows.items()):
            x = np.arange(len(groups)) + (index - (len(rows) - 1) / 2) * width
            y = np.array([cell["accuracy"] for cell in cells[: len(groups)]])
            edges = np.array([cell["ci95"] for cell in cells[: len(groups)]]).T
            style = {"color": COLORS[index % len(COLORS)], "hatch": HATCHES[index % len(HATCHES)]}
            place.bar(x, y, width * 0.92, alpha=0.75, label=short(model), edgecolor=INK, **style)
            place.errorbar(x, y, yerr=np.abs(edges - y), fmt="none", color=INK, capsize=2)
        names = [short(group.rpartition("/")[2])[:18] for group in groups]
        turned = len(groups) > 4
        place.set_xticks(
            range(len(groups)),
            names,
            rotation=20 if turned else 0,
            ha="right" if turned else "center",
            fontsize=7.5,
        )
        place.set_ylim(0, 1)
        place.set_ylabel("accuracy")

    parts = [
        f"{short(model)} " + ", ".join(percent(cell["accuracy"]) for cell in cells[: len(groups)])
        for model, cells in rows.items()
    ]
    alt = f"{title}, in {', '.join(map(short, groups))}: {'; '.join(parts)}."
    return Figure(title, alt, _svg(name, title, alt, [[short(model) for model in rows]], draw))
