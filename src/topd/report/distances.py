"""The figures of audited candidates: how far apart their futures are, and whether the token loss tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from topd.paper import PROBE
from topd.report.records import Point
from topd.report.svg import BLUE, INK, ORANGE, VERMILION, Figure, drawing, legend

Floats = NDArray[np.float64]

SCATTER_UP_TO = 400
"""More candidates than this are drawn as a density."""
BINS, BIN_PLACES = 8, 5
"""Bins of the mean's line, as many as Fig. 6 has, and the fewest candidates that one is drawn for (our choice)."""


def distance_figures(points: Sequence[Point]) -> list[Figure]:
    """How far apart the futures of the audited candidates are."""
    return [figure for figure in (_histogram(points), loss_against_distance(points)) if figure]


def _histogram(points: Sequence[Point]) -> Figure | None:
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
        bins = np.linspace(0, max(1.0, *forks, *alarms), 41)
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
        "All audited candidates with a distance. Unless a threshold is set, each batch draws its own line between the "
        "two, so they may overlap.",
    )


def loss_against_distance(points: Sequence[Point], name: str = "loss-distance") -> Figure | None:
    """Each candidate's token loss and D_OT. `name`: unique on the page."""
    return _scatter([(p.token_loss, p.distance, p.kind) for p in points], "Token loss", name)


def teacher_nll_against_distance(points: Sequence[Point], name: str) -> Figure | None:
    """The same with the teacher's NLL of the sampled token, the x axis of the paper's Fig. 6."""
    return _scatter([(p.teacher_nll, p.distance, p.kind) for p in points], "Teacher's NLL", name)


def _scatter(places: Sequence[tuple[float | None, float | None, str]], axis: str, name: str) -> Figure | None:
    """Dots or, where there are many, their density; the linear trend; means of bins with their standard errors."""
    known = [(x, y, kind) for x, y, kind in places if x is not None and y is not None]
    if len(known) < 2:
        return None
    loss, distance = np.array([row[0] for row in known]), np.array([row[1] for row in known])
    related = f"Pearson r = {correlation(loss, distance)}, Spearman ρ = {correlation(_ranks(loss), _ranks(distance))}"
    alt = f"{axis} against transport distance of {len(known)} candidates: {related}."
    with drawing(name, alt) as figure:
        axes = figure.axes[0]
        if len(known) > SCATTER_UP_TO:
            _density(axes, loss, distance)
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
        f"and reports {PROBE['pearson']} and {PROBE['spearman']}. Bins: equal width, at least {BIN_PLACES} candidates.",
    )


def _density(axes: Axes, x: Floats, y: Floats) -> None:
    cells = axes.hexbin(x, y, gridsize=(36, 18), mincnt=1, linewidths=0)
    density = np.log1p(np.asarray(cells.get_array(), dtype=float))
    cells.set_array(None)
    cells.set_facecolor([to_rgba(BLUE, 0.12 + 0.88 * share) for share in density / density.max()])


def _dots(axes: Axes, x: Floats, y: Floats, kinds: Sequence[str]) -> None:
    for kind, label in (("alarm", "false alarm"), ("fork", "fork")):
        chosen = np.array([each == kind for each in kinds])
        filled = {"facecolors": BLUE, "alpha": 0.55} if kind == "fork" else {"facecolors": "none", "edgecolors": INK}
        axes.scatter(x[chosen], y[chosen], s=13, linewidths=0.8 * (kind == "alarm"), label=label, **filled)


def binned_means(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Of `BINS` bins of equal width in x: mean of x, mean of y, standard error of the latter; sparse ones left out."""
    bins = np.clip(((x - x.min()) / np.ptp(x) * BINS).astype(int), 0, BINS - 1)
    rows = []
    for number in range(BINS):
        here = bins == number
        if here.sum() >= BIN_PLACES:
            rows.append((x[here].mean(), y[here].mean(), y[here].std(ddof=1) / np.sqrt(here.sum())))
    centre, mean, error = np.array(rows, dtype=float).reshape(-1, 3).T
    return centre, mean, error


def correlation(a: Floats, b: Floats) -> str:
    """Pearson's r with three decimals, or a dash if one side does not vary."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return "–"
    return f"{np.corrcoef(a, b)[0, 1]:.3f}".replace("-", "−")


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]
