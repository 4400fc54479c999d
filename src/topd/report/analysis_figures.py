"""The figures of a probe and of a local correction: the paper's figures 2, 5 and 6 for this pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from topd.paper import GROUPS, LOCAL_CORRECTION, NEAR_ZERO, NEAR_ZERO_SHARES, PROBE
from topd.report.analyses import CorrectRecords, ProbeRecords
from topd.report.distances import loss_against_distance, teacher_nll_against_distance
from topd.report.svg import BLUE, GREEN, INK, ORANGE, VERMILION, Figure, drawing, legend

_MOST_DOTS = 300


def probe_figures(probe: ProbeRecords, index: int = 0) -> list[Figure]:
    """D_OT by group, in each reading, and token loss and teacher's NLL against it. `index`: of the run on the page."""
    figures = [
        _groups(probe, f"groups-{index}"),
        _readings(probe, f"readings-{index}"),
        loss_against_distance(probe.points, f"probe-loss-{index}"),
        teacher_nll_against_distance(probe.points, f"probe-nll-{index}"),
    ]
    return [figure for figure in figures if figure]


def _groups(probe: ProbeRecords, name: str) -> Figure | None:
    groups = {words: probe.main[group] for group, words in GROUPS.items() if probe.main[group]}
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
        "Boxes: quartiles and median; whiskers: the farthest values within 1.5 box lengths. At each place the "
        "student's window is compared with the teacher's continuation of the same prefix. The same figure for the "
        "paper's pair is its Fig. 2.",
    )


def _readings(probe: ProbeRecords, name: str) -> Figure | None:
    """The paper's Fig. 2a in each reading of the student's window: one panel each."""
    shown = {kind: groups for kind, groups in probe.distances.items() if all(groups.values())}
    if len(shown) < 2:
        return None
    near = "; ".join(
        f"{kind}, "
        + ", ".join(f"{GROUPS[group]} {np.mean(np.less(values, NEAR_ZERO)):.1%}" for group, values in g.items())
        for kind, g in shown.items()
    )
    farthest = max(value for groups in shown.values() for values in groups.values() for value in values)
    bins = np.arange(0, farthest + 2 * NEAR_ZERO, NEAR_ZERO).tolist()
    with drawing(
        name, f"Histograms of transport distance, share below {NEAR_ZERO}: {near}.", panels=len(shown), width=9.4
    ) as figure:
        for (kind, groups), axes in zip(shown.items(), figure.axes, strict=True):
            for (group, values), colour in zip(groups.items(), (VERMILION, BLUE, GREEN), strict=True):
                label = GROUPS[group] if axes is figure.axes[0] else None
                axes.hist(values, bins, density=True, histtype="step", color=colour, linewidth=1.2, label=label)
            axes.set_title(kind, loc="left", fontsize=9)
            axes.set_xlabel("D_OT")
        figure.axes[0].set_ylabel("density")
        legend(figure)
    paper = ", ".join(f"{NEAR_ZERO_SHARES[group]:.1%} of the {words} ones" for group, words in GROUPS.items())
    return Figure(
        "The student's window in each reading",
        figure.svg,
        f"The same places and the same windows of the teacher. The first bin holds D_OT below {NEAR_ZERO}: in the "
        f"paper's Fig. 2a {paper} (read off the figure).",
        wide=True,
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
