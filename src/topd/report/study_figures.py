"""The figures of a study: differences from OPD, and learning curves, an arm a panel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from topd.report.forest import Estimate, forest
from topd.report.reading import mapping, mappings, number
from topd.report.svg import BLUE, INK, Drawing, Figure, drawing
from topd.report.words import signed

Arms = Mapping[str, Mapping[str, Any]]
Curves = dict[str, list[NDArray[np.float64]]]
"""By arm, for each seed [2, point]: x and accuracy; equally many points."""

AXES = (
    ("step", "steps", "optimizer steps"),
    ("tokens", "tokens", "tokens read and generated"),
    ("seconds", "seconds", "seconds of training"),
)
_REFERENCE = "opd"
_WIDTH, _PANELS = 9.4, 4


def difference_figure(arms: Arms, index: int = 0) -> Figure | None:
    """Each arm less OPD, by way of decoding. `index`: of the study on the page."""
    rows: dict[str, dict[str, Estimate]] = {}
    for name, arm in arms.items():
        for how in ("greedy", "sampled"):
            beside = mapping(mapping(arm.get(how)).get("beside_opd"))
            found = [100 * value for key in ("mean", "low", "high") if (value := number(beside.get(key))) is not None]
            if len(found) == 3:
                rows.setdefault(name, {})[how] = (found[0], found[1], found[2])
    if not rows:
        return None
    described = "; ".join(f"{name}, {how} {signed(found[how][0])}" for name, found in rows.items() for how in found)
    alt = f"Points more than OPD: {described}."
    svg = forest(f"study-forest-{index}", alt, rows, "points more than OPD", width=_WIDTH)
    caption = "Same seeds, prompts and problems; 95 % intervals over seeds and problems. "
    caption += "Filled: the interval leaves out 0."
    return Figure("Difference from OPD", svg, caption, wide=True)


def learning_curves(arms: Arms, index: int = 0) -> list[Figure]:
    """Accuracy by steps, tokens and seconds. `index`: of the study on the page."""
    return [figure for axis in AXES if (figure := _curves(arms, *axis, index))]


def _curves(arms: Arms, key: str, name: str, unit: str, index: int) -> Figure | None:
    curves: Curves = {arm: found for arm, values in arms.items() if (found := _seeds(values.get("curve"), key))}
    if not curves:
        return None
    panels = [arm for arm in curves if arm != _REFERENCE] or [_REFERENCE]
    ends = {arm: np.mean(found, axis=0)[1, [0, -1]] for arm, found in curves.items()}
    described = "; ".join(f"{arm} {first:.3g} to {last:.3g}" for arm, (first, last) in ends.items())
    columns = min(_PANELS, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(
        f"study-{name}-{index}", f"Accuracy by {unit}: {described}.",
        panels=columns, rows=rows, height=0.7 + 1.5 * rows + 0.7 * (len(panels) < 3), width=_WIDTH,
    ) as figure:  # fmt: skip
        for arm, axes in zip(panels, figure.axes, strict=False):
            _draw(axes, curves[arm], BLUE, "-")
            if arm != _REFERENCE and _REFERENCE in curves:
                _draw(axes, curves[_REFERENCE], INK, "--")
            axes.set_title(arm if len(arm) <= 30 else f"{arm[:29]}…", loc="left", fontsize=9)
        _label(figure, len(panels), columns, key, unit)
    caption = "Solid: the arm; dashed: OPD. Means over seeds, each seed thin. The problems are in no training set, and "
    caption += "nothing is chosen by them."
    return Figure(f"Learning curves by {name}", figure.svg, caption, wide=True)


def _draw(axes: Axes, seeds: list[NDArray[np.float64]], colour: str, style: str) -> None:
    if len(seeds) > 1:
        for x, y in seeds:
            axes.plot(x, y, style, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(*np.mean(seeds, axis=0), style, color=colour)


def _label(figure: Drawing, count: int, columns: int, key: str, unit: str) -> None:
    """Scales at the left and below the last panel of each column; empty panels disappear."""
    for place, axes in enumerate(figure.axes):
        axes.set_visible(place < count)
        lowest = place + columns >= count
        axes.tick_params(axis="x", labelbottom=lowest)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=key == "step"))
        if key == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.canvas.supxlabel(unit, fontsize=9, color=INK)
    figure.canvas.supylabel("share right, greedy", fontsize=9, color=INK)


def _seeds(curves: Any, key: str) -> list[NDArray[np.float64]]:
    """[2, point] of each seed, as many points as the shortest has; none if that is one."""
    found = [
        [(x, y) for point in mappings(curve)
         if (x := number(point.get(key))) is not None and (y := number(point.get("accuracy"))) is not None]
        for curve in mapping(curves).values()
    ]  # fmt: skip
    shortest = min(map(len, found), default=0)
    return [np.array(points[:shortest]).T for points in found] if shortest > 1 else []
