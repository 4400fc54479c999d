"""The figures of a probe and of a local correction: the paper's figures 2, 5 and 6 for this pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from topd.paper import LOCAL_CORRECTION, PROBE
from topd.report.analyses import GROUPS, CorrectRecords, ProbeRecords
from topd.report.distances import loss_against_distance
from topd.report.svg import BLUE, GREEN, INK, ORANGE, Figure, drawing, legend

_MOST_DOTS = 300


def probe_figures(probe: ProbeRecords, index: int = 0) -> list[Figure]:
    """D_OT by group, and token loss against it. `index`: of the run on the page."""
    figures = [_groups(probe, f"groups-{index}"), loss_against_distance(probe.points, f"probe-loss-{index}")]
    return [figure for figure in figures if figure]


def _groups(probe: ProbeRecords, name: str) -> Figure | None:
    groups = {words: probe.distances[group] for group, words in GROUPS.items() if probe.distances[group]}
    if not groups:
        return None
    described = "; ".join(f"{words} median {np.median(values):.3g}" for words, values in groups.items())
    with drawing(name, f"Transport distance by group of places: {described}.") as figure:
        paper = [PROBE[group] for group, words in GROUPS.items() if words in groups]
        _boxes(figure.axes[0], groups, paper, "paper's median")
        legend(figure)
    return Figure(
        "Transport distance by token loss",
        figure.svg,
        "Boxes: quartiles and median; whiskers: the farthest values within 1.5 box lengths. At each place both models "
        "go on from the student's prefix. The same figure for the paper's pair is its Fig. 2.",
    )


def correct_figure(correct: CorrectRecords, index: int = 0) -> Figure | None:
    """D_OT to the teacher's window before and after each arm."""
    values: dict[str, list[float]] = {}
    for case in correct.cases:
        for window in case.windows:
            if window.distance is not None:
                values.setdefault(window.name, []).append(window.distance)
    if not values:
        return None
    described = "; ".join(f"{name} mean {np.mean(some):.3g}" for name, some in values.items())
    with drawing(f"correct-{index}", f"Transport distance before and after: {described}.", height=3.2) as figure:
        _boxes(figure.axes[0], values, [LOCAL_CORRECTION.get(name) for name in values], "paper's mean")
        figure.axes[0].tick_params(axis="x", labelrotation=18)
        legend(figure)
    return Figure(
        "How far the student's window is from the teacher's",
        figure.svg,
        "The same forks, each corrected from the same weights. Boxes: quartiles and median; the dotted line: the mean. "
        "For the paper's pair: its Fig. 5.",
    )


def _boxes(axes: Axes, groups: dict[str, list[float]], paper: Sequence[float | None], label: str) -> None:
    rng = np.random.default_rng(0)
    for place, values in enumerate(groups.values()):
        shown = np.asarray(values if len(values) <= _MOST_DOTS else rng.choice(values, _MOST_DOTS, replace=False))
        spread = place + rng.uniform(-0.16, 0.16, len(shown))
        axes.scatter(spread, shown, s=5, color=BLUE, alpha=0.25, linewidths=0)
    line = {"color": INK, "linewidth": 1.1}
    axes.boxplot(
        list(groups.values()), positions=range(len(groups)), widths=0.5, showfliers=False, showmeans=True,
        meanline=True, patch_artist=True, boxprops={"facecolor": to_rgba(INK, 0.1), "edgecolor": INK, "linewidth": 0.9},
        whiskerprops=line, capprops=line, medianprops={"color": BLUE, "linewidth": 1.8},
        meanprops={"color": GREEN, "linewidth": 1.4, "linestyle": ":"},
    )  # fmt: skip
    known = [(place, value) for place, value in enumerate(paper) if value is not None]
    axes.plot(
        [place for place, _ in known], [value for _, value in known], "D", color=ORANGE, markersize=5, label=label
    )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("D_OT")
    axes.set_ylim(bottom=min(-0.02, axes.dataLim.y0))
