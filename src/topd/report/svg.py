"""Matplotlib figures as SVG inside the page: text, fonts and colours follow the page, light or dark."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas

INK = "#808080"
"""Text, axes and neutral marks; becomes the colour of the page's text."""
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

_CSS = {
    INK: "currentColor",
    BLUE: f"var(--blue,{BLUE})",
    ORANGE: f"var(--orange,{ORANGE})",
    GREEN: f"var(--green,{GREEN})",
    PURPLE: f"var(--purple,{PURPLE})",
    SKY: f"var(--sky,{SKY})",
    VERMILION: f"var(--vermilion,{VERMILION})",
}
_COLOUR = re.compile("|".join(_CSS))
_REFERENCE = re.compile(r"#([\w.-]+)")
_FONT_FAMILY = re.compile(r" ?font-family: [^;]*;?")
_FONT = re.compile(r"font: [^;]*?([\d.]+px)[^;]*")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_THIN = ("axes.linewidth", "xtick.major.width", "ytick.major.width", "grid.linewidth")
_LEFT_OUT = ("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon")
_SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(_INKED, INK),
    **dict.fromkeys(_THIN, 0.6),
    **dict.fromkeys(_LEFT_OUT, False),
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.22,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.6,
}


class Drawing:
    """One figure being drawn: `axes` to draw on, and the finished `svg` afterwards."""

    def __init__(self, canvas: Canvas, axes: list[Axes]) -> None:
        self.canvas, self.axes, self.svg = canvas, axes, ""


@contextmanager
def drawing(
    name: str, alt: str, *, panels: int = 1, rows: int = 1, height: float = 2.7, width: float = 4.6
) -> Iterator[Drawing]:
    """Draw on `axes`; when the block ends, `svg` holds the figure.

    Args:
        name: unique on the page; all ids in the figure start with it.
        alt: what the figure shows, for those who cannot see it.
        panels, rows: number of axes side by side and below each other; all share their scale.
        height, width: inches.
    """
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        grid = canvas.subplots(rows, panels, sharey=True, sharex=True, squeeze=False)
        result = Drawing(canvas, list(grid.flat))
        yield result
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True)
    result.svg = inline(buffer.getvalue(), name, alt)


def legend(figure: Drawing) -> None:
    """Above the axes, where it never covers data."""
    if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
        figure.canvas.legend(loc="outside upper right", ncols=4, columnspacing=1.2)


def label_lines(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends instead of in a legend; names that would overlap are moved apart.

    `axes`: with its limits and scale set; `ends`: y of the line's end, its name and its colour.
    """
    height = 72 * axes.get_figure().get_figheight() * 0.72 / axes.get_subplotspec().get_gridspec().nrows  # type: ignore[union-attr]
    gap = 10.5 / height
    scale, limits = axes.transScale, axes.transLimits
    places = [min(max(limits.transform(scale.transform((1, y)))[1], 0.0), 1.0) for y, _, _ in ends]
    order = sorted(range(len(ends)), key=places.__getitem__)
    for before, after in pairwise(order):
        places[after] = max(places[after], places[before] + gap)
    excess = max(0.0, places[order[-1]] - 1.0) if order else 0.0
    for place, (_, name, colour) in zip(places, ends, strict=True):
        axes.annotate(
            name if len(name) <= 24 else f"{name[:23]}…", (1, place - excess), (4, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", color=colour, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


MARKS = [(BLUE, "o"), (GREEN, "D"), (VERMILION, "s"), (PURPLE, "^"), (ORANGE, "v"), (SKY, "P")]
"""Colour and shape of each series: they differ by both."""
_ROW, _SERIES = 0.1, 0.16
"""Inches: between rows of a forest, and of each series in a row."""

Estimate = tuple[float, float, float]
"""Mean, and the ends of its interval."""


def forest(name: str, alt: str, rows: Mapping[str, Mapping[str, Estimate]], unit: str, *, width: float = 4.6) -> str:
    """Differences as dots with intervals, one row each, about the line of no difference.

    `rows`: by label, from the top; by series, which may be missing in some. The rest: see `drawing`.
    """
    series = list(dict.fromkeys(one for row in rows.values() for one in row))
    height = 0.75 + len(rows) * (_ROW + _SERIES * len(series)) + 0.2 * (len(series) > 1)
    with drawing(name, alt, height=height, width=width) as figure:
        axes = figure.axes[0]
        axes.axvline(0, color=INK, linewidth=0.9)
        for index, one in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * _SERIES / (_ROW + _SERIES * len(series))
            _dots(axes, {at + shift: found[one] for at, found in enumerate(rows.values()) if one in found}, one, index)
        axes.set_yticks(range(len(rows)), [label if len(label) <= 34 else f"{label[:33]}…" for label in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False)
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        if len(series) > 1:
            legend(figure)
    return figure.svg


def _dots(axes: Axes, found: Mapping[float, Estimate], label: str, index: int) -> None:
    """Filled where the interval excludes 0."""
    colour, mark = MARKS[index % len(MARKS)]
    at = list(found)
    means, lows, highs = zip(*found.values(), strict=True)
    axes.hlines(at, lows, highs, color=colour, linewidth=1.4)
    face = [colour if low > 0 or high < 0 else to_rgba(colour, 0.0) for low, high in zip(lows, highs, strict=True)]
    axes.scatter(means, at, s=22, marker=mark, facecolors=face, edgecolors=colour, linewidths=1.2, zorder=3)
    axes.plot([], [], mark, color=colour, markersize=5, label=label[:28])


def inline(document: str, name: str, alt: str) -> str:
    """Turn an SVG document into an element for an HTML page, with ids of its own and a text alternative."""
    root = ElementTree.fromstring(document)
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in [child for child in parent if child.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
    referenced = {
        found for element in root.iter() for value in element.attrib.values() for found in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.attrib = {
            key.rpartition("}")[2]: _attribute(key, value, name)
            for key, value in element.attrib.items()
            if (key != "id" or value in referenced) and not value.startswith("rotate(-0 ")
        }
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    view_box = root.get("viewBox", "")
    root.attrib = {"viewBox": view_box, "class": "figure", "role": "img", "aria-label": alt}
    title = ElementTree.Element("title")
    title.text = alt
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-")
    value = _LONG_NUMBER.sub(lambda found: f"{float(found.group()):.2f}", " ".join(value.split()))
    if key in ("style", "fill", "stroke"):
        value = _COLOUR.sub(lambda found: _CSS[found.group()], value)
        value = _FONT_FAMILY.sub("", _FONT.sub(r"font-size: \1", value))
    return value.replace("url(#", f"url(#{name}-")
