"""Differences as dots with intervals, a row each, about the line of no difference."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from topd.report.svg import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, drawing, legend

MARKS = [(BLUE, "o"), (GREEN, "D"), (VERMILION, "s"), (PURPLE, "^"), (ORANGE, "v"), (SKY, "P")]
"""Colour and shape of each series: they differ by both."""
_ROW, _SERIES = 0.1, 0.16
"""Inches: between rows, and of each series in a row."""

Estimate = tuple[float, float, float]
"""Mean, and the ends of its interval."""


def forest(name: str, alt: str, rows: Mapping[str, Mapping[str, Estimate]], unit: str, *, width: float = 4.6) -> str:
    """The figure's SVG.

    Args:
        name, alt, width: see `drawing`.
        rows: by label, from the top; by series, which may be missing in some.
        unit: of the estimates.
    """
    series = list(dict.fromkeys(one for row in rows.values() for one in row))
    height = 0.75 + len(rows) * (_ROW + _SERIES * len(series)) + 0.2 * (len(series) > 1)
    with drawing(name, alt, height=height, width=width) as figure:
        axes = figure.axes[0]
        axes.axvline(0, color=INK, linewidth=0.9)
        for index, one in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * _SERIES / (_ROW + _SERIES * len(series))
            _dots(
                axes, {row + shift: found[one] for row, found in enumerate(rows.values()) if one in found}, one, index
            )
        axes.set_yticks(range(len(rows)), [label if len(label) <= 34 else f"{label[:33]}…" for label in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False)
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        if len(series) > 1:
            legend(figure)
    return figure.svg


def _dots(axes: Axes, found: Mapping[float, Estimate], label: str, index: int) -> None:
    """Filled where the interval leaves out 0."""
    colour, mark = MARKS[index % len(MARKS)]
    at = list(found)
    means, lows, highs = zip(*found.values(), strict=True)
    axes.hlines(at, lows, highs, color=colour, linewidth=1.4)
    face = [colour if low > 0 or high < 0 else to_rgba(colour, 0.0) for low, high in zip(lows, highs, strict=True)]
    axes.scatter(means, at, s=22, marker=mark, facecolors=face, edgecolors=colour, linewidths=1.2, zorder=3)
    axes.plot([], [], mark, color=colour, markersize=5, label=label[:28])
