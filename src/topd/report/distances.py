"""Figures about D_OT: audited candidates, a probe (the paper's Figs. 2 and 6), a local correction (its Fig. 5)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.stats import binned_statistic, rankdata

from topd.paper import GROUPS, LOCAL_CORRECTION, NEAR_ZERO, NEAR_ZERO_SHARES, PROBE
from topd.report.elements import Figure, decimals
from topd.report.rollouts import Candidate
from topd.report.svg import BLUE, GREEN, INK, ORANGE, VERMILION, drawing, legend

Floats = NDArray[np.float64]

_MOST_DOTS = 300
"""Values shown as dots behind a box."""
BINS, BIN_PLACES = 8, 5
"""Bins of the mean's line, as many as Fig. 6 has, and the fewest candidates that one is drawn for (our choice)."""


def distance_figures(points: Sequence[Candidate]) -> list[Figure]:
    """D_OT of the candidates in audited rollouts."""
    return [figure for figure in (_histogram(points), scatter(points)) if figure]


def _histogram(points: Sequence[Candidate]) -> Figure | None:
    forks, alarms = (
        [point.distance for point in points if point.kind == kind and point.distance is not None]
        for kind in ("fork", "alarm")
    )
    if not forks and not alarms:
        return None
    medians = [f"{len(some)} {what}" + (f", median {np.median(some):.3g}" if some else "")
               for what, some in (("forks", forks), ("false alarms", alarms))]  # fmt: skip
    with drawing("histogram", f"Histogram of transport distances: {'; '.join(medians)}.") as figure:
        axes = figure.axes[0]
        bins = np.linspace(0, 1.02 * max([*forks, *alarms]) or 1.0, 41)
        below, _ = np.histogram(alarms, bins)
        above, _ = np.histogram(forks, bins)
        bar = {"width": 0.86 * bins[1], "align": "edge"}
        some, more = below > 0, above > 0  # a bar of height 0 would still be drawn as a line
        label = f"false alarms ({len(alarms):,})"
        axes.bar(
            bins[:-1][some], below[some], color=to_rgba(INK, 0.12), edgecolor=INK, linewidth=0.8, label=label, **bar
        )
        label = f"forks ({len(forks):,})"
        axes.bar(bins[:-1][more], above[more], bottom=below[more], color=BLUE, label=label, **bar)
        axes.set_xlabel("D_OT")
        axes.set_ylabel("candidates")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(figure)
    return Figure(
        "Forks and false alarms by distance",
        figure.svg,
        "Candidates with a distance, in audited rollouts only. The threshold may change during training, so the two "
        "may overlap.",
    )


def scatter(points: Sequence[Candidate], axis: str = "Token loss", name: str = "loss-distance") -> Figure | None:
    """Each candidate's D_OT by token loss or, as in the paper's Fig. 6, by the teacher's NLL of the sampled token.

    Dots or, where there are many, their density; the linear trend; means of bins with their standard errors. `name`:
    unique on the page.
    """
    places = [(p.token_loss if axis == "Token loss" else p.teacher_nll, p.distance, p.kind) for p in points]
    known = [(x, y, kind) for x, y, kind in places if x is not None and y is not None]
    if len(known) < 2:
        return None
    loss, distance = np.array([row[0] for row in known]), np.array([row[1] for row in known])
    spearman = correlation(rankdata(loss), rankdata(distance))
    related = f"Pearson r = {correlation(loss, distance)}, Spearman ρ = {spearman}"
    alt = f"{axis} against transport distance of {len(known)} candidates: {related}."
    with drawing(name, alt) as figure:
        axes = figure.axes[0]
        if len(known) > 400:
            shades = LinearSegmentedColormap.from_list("density", [to_rgba(BLUE, 0.12), to_rgba(BLUE)])
            axes.hexbin(loss, distance, gridsize=(36, 18), mincnt=1, linewidths=0, bins="log", cmap=shades)
        else:
            _dots(axes, loss, distance, [row[2] for row in known])
        if np.ptp(loss) > 0:
            slope, offset = np.polyfit(loss, distance, 1)
            ends = np.array([loss.min(), loss.max()])
            axes.plot(ends, offset + slope * ends, "--", color=ORANGE, label="linear trend")
            centre, mean, error = binned_means(loss, distance)
            axes.errorbar(
                centre, mean, error, fmt="o-", color=VERMILION, markersize=3, capsize=2, label="bin mean ± SE"
            )
        legend(figure)
        axes.set_xlabel(f"{axis[0].lower()}{axis[1:]}, nats")
        axes.set_ylabel("D_OT")
        axes.set_ylim(bottom=min(-0.02, distance.min()))
    return Figure(
        f"{axis} against distance",
        figure.svg,
        f"{related}, {len(known):,} candidates. The paper's Fig. 6 has the teacher's NLL on its x axis (9 to 33 nats) "
        f"and reports {PROBE['pearson']} and {PROBE['spearman']}. Bins have equal width and at least {BIN_PLACES} "
        "candidates.",
    )


def _dots(axes: Axes, x: Floats, y: Floats, kinds: Sequence[str]) -> None:
    for kind, label in (("alarm", "false alarm"), ("fork", "fork")):
        chosen = np.array([each == kind for each in kinds])
        filled = {"facecolors": BLUE, "alpha": 0.55} if kind == "fork" else {"facecolors": "none", "edgecolors": INK}
        axes.scatter(x[chosen], y[chosen], s=13, linewidths=0.8 * (kind == "alarm"), label=label, **filled)


def binned_means(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Of `BINS` bins of equal width in x: mean of x, mean of y, standard error of the latter; sparse ones left out."""
    count = binned_statistic(x, y, "count", BINS).statistic
    enough = count >= BIN_PLACES
    (centre, mean), (_, deviation) = (binned_statistic(x, [x, y], of, BINS).statistic for of in ("mean", "std"))
    return centre[enough], mean[enough], deviation[enough] / np.sqrt(count[enough] - 1)


def correlation(a: Floats, b: Floats) -> str:
    """Pearson's r with three decimals, or a dash if one side does not vary."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return "–"
    return decimals(float(np.corrcoef(a, b)[0, 1]))


def groups_figure(main: Mapping[str, Sequence[float]], name: str) -> Figure | None:
    groups = {words: main[group] for group, words in GROUPS.items() if main.get(group)}
    if not groups:
        return None
    described = "; ".join(f"{words} median {np.median(values):.3g}" for words, values in groups.items())
    with drawing(name, f"Transport distance by group of places: {described}.") as figure:
        paper = [PROBE[group] for group, words in GROUPS.items() if words in groups]
        _boxes(figure.axes[0], groups, paper, "paper's median")
    return Figure(
        "Transport distance by token loss",
        figure.svg,
        "Boxes: quartiles and median; whiskers: the farthest values within 1.5 box lengths. At each position the "
        "student's window is compared with the teacher's continuation of the same prefix. Compare the paper's Fig. 2.",
    )


def readings_figure(distances: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> Figure | None:
    """The paper's Fig. 2a in each reading of the student's window: one panel each."""
    shown = {kind: groups for kind, groups in distances.items() if all(groups.values())}
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
        f"The same positions and teacher windows. The first bin holds D_OT below {NEAR_ZERO}: in the paper's Fig. 2a "
        f"{paper} (read off the figure).",
        wide=True,
    )


def correct_figure(values: Mapping[str, Sequence[float]], name: str) -> Figure | None:
    """D_OT to the teacher's window before and after each arm."""
    if not values:
        return None
    described = "; ".join(f"{arm} mean {np.mean(some):.3g}" for arm, some in values.items())
    with drawing(name, f"Transport distance before and after: {described}.", height=3.2) as figure:
        _boxes(figure.axes[0], values, [LOCAL_CORRECTION.get(arm) for arm in values], "paper's mean")
        figure.axes[0].tick_params(axis="x", labelrotation=18)
    return Figure(
        "Distance between the student's and the teacher's window",
        figure.svg,
        "The same forks, each corrected from the same weights. Boxes: quartiles and median; dotted line: mean. Compare "
        "the paper's Fig. 5.",
    )


def _boxes(axes: Axes, groups: Mapping[str, Sequence[float]], paper: Sequence[float | None], label: str) -> None:
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
    axes.plot([place for place, _ in known], [value for _, value in known], "D", color=ORANGE, markersize=5)
    if known:
        axes.annotate(label, known[-1], (-6, 6), textcoords="offset points", ha="right", fontsize=8.5)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("D_OT")
    axes.set_ylim(bottom=min(-0.02, axes.dataLim.y0))
