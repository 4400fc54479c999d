"""The figures of training: curves by step, and seconds by stage. What has no data is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from topd.report.reading import number
from topd.report.records import Arm
from topd.report.svg import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, Figure, drawing, legend

Floats = NDArray[np.float64]

QUANTILES = (("token_loss/q99", "99 %", ":"), ("token_loss/q90", "90 %", "--"), ("token_loss/q50", "50 %", "-"))
STAGES = (
    ("seconds/rollout", "rollout", SKY),
    ("seconds/scoring", "scoring", BLUE),
    ("seconds/windows", "windows", ORANGE),
    ("seconds/calibration", "calibration", INK),
    ("seconds/transport", "transport", PURPLE),
    ("seconds/loss", "loss", GREEN),
    ("seconds/backward", "backward", VERMILION),
)
_MOST_POINTS = 300
"""A longer curve is drawn as the means of so many equal parts."""


@dataclass(frozen=True)
class Curve:
    """One metric by step, one line an arm."""

    name: str
    key: str
    title: str
    unit: str
    caption: str


@dataclass(frozen=True)
class Band:
    """A metric by step, with what lies about it as a band."""

    name: str
    low: str
    middle: str
    high: str
    title: str
    unit: str
    caption: str


DISTANCE = Band(
    "distance",
    "distance/q25",
    "distance/q50",
    "distance/q75",
    "Transport distance of candidates",
    "D_OT",
    "Median D_OT between the student's and the teacher's next tokens. The band: middle half of candidates.",
)
ACCURACY = Band(
    "accuracy",
    "accuracy/low",
    "accuracy",
    "accuracy/high",
    "Accuracy",
    "share",
    "Share of held-out problems answered right while training goes on. The band: 95 % interval over problems.",
)

CURVES = (
    Curve(
        "own-token",
        "guidance/own_token_share",
        "Own-token share",
        "share",
        "How much of the guidance asks the student for the token that it wrote itself: the part that only sharpens.",
    ),
    Curve(
        "guidance-loss",
        "guidance/loss",
        "Guidance loss",
        "nats",
        "KL(aligned target ‖ student), mean over guided window positions, before it is multiplied by λ.",
    ),
    Curve(
        "length",
        "completions/mean_length",
        "Response length",
        "tokens",
        "Mean length of the student's responses. A sudden change often explains one in the loss.",
    ),
)


def curve_figures(arms: Sequence[Arm]) -> list[Figure]:
    """What was logged by step."""
    forward = any(number(arm.options.get("beta")) == 0 for arm in arms)
    direction = "KL(teacher ‖ student)" if forward else "KL(student ‖ teacher)"
    loss = Curve(
        "loss",
        "token_loss/mean",
        "Token loss",
        "nats",
        f"{direction} over the full vocabulary, mean over the response tokens of the student's own rollouts.",
    )
    alarms = Curve(
        "alarms",
        "false_alarm_share",
        "False alarms among candidates",
        "share",
        "Share of high-loss tokens whose futures stay close. Under the default rule, which calls a fixed share of each "
        "batch false alarms, this follows the rule; under a fixed distance threshold it is a measurement.",
    )
    figures = [_curve(loss, arms), _quantiles(arms), _band(DISTANCE, arms), _curve(alarms, arms), _band(ACCURACY, arms)]
    figures += [_curve(curve, arms) for curve in CURVES]
    return [figure for figure in [*figures, _seconds(arms)] if figure]


def _curve(curve: Curve, arms: Sequence[Arm]) -> Figure | None:
    lines = {arm.name: thin(*series) for arm in arms if (series := arm.series(curve.key))[0]}
    if not lines:
        return None
    described = "; ".join(f"{name} {_ends(*line)}" for name, line in lines.items())
    with drawing(curve.name, f"{curve.title} by training step, in {curve.unit}: {described}.") as figure:
        axes = figure.axes[0]
        for name, line in lines.items():
            colour, style = arm_styles(arms)[name]
            axes.plot(*line, style, color=colour, label=name, marker="o", markersize=2.5 if len(line[0]) < 4 else 0)
        _by_step(axes, curve.unit)
        if len(arms) > 1:
            legend(figure)
        _from_zero(axes, top=1.0 if curve.unit == "share" else None)
    return Figure(curve.title, figure.svg, curve.caption)


def _quantiles(arms: Sequence[Arm]) -> Figure | None:
    shown = [arm for arm in arms if any(arm.series(key)[0] for key, _, _ in QUANTILES)]
    if not shown:
        return None
    described = "; ".join(
        f"{arm.name}, {label} quantile {_ends(*arm.series(key))}"
        for arm in shown
        for key, label, _ in QUANTILES
        if arm.series(key)[0]
    )
    with drawing(
        "quantiles", f"Quantiles of the token loss by step, in nats: {described}.", panels=len(shown)
    ) as figure:
        for arm, axes in zip(shown, figure.axes, strict=True):
            colour, _ = arm_styles(arms)[arm.name]
            for key, label, style in QUANTILES:
                steps, values = thin(*arm.series(key))
                axes.plot(steps, values, style, color=colour, label=label)
            axes.set_title(arm.name if len(arms) > 1 else "", loc="left", fontsize=9)
            axes.tick_params(axis="y", which="minor", length=0)
            _by_step(axes, "nats" if axes is figure.axes[0] else "", ticks=5 if len(shown) == 1 else 3)
        _whole_decades(
            figure.axes[0], [value for arm in shown for key, _, _ in QUANTILES for value in arm.series(key)[1]]
        )
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.canvas.legend(handles, labels, loc="outside upper right", ncols=3)
    return Figure(
        "Token loss, quantiles",
        figure.svg,
        "Half, nine tenths and 99 hundredths of the tokens of a step lie below these lines (logarithmic scale): "
        "the loss sits in few tokens.",
    )


def _band(band: Band, arms: Sequence[Arm]) -> Figure | None:
    shown = [arm for arm in arms if arm.series(band.middle)[0]]
    if not shown:
        return None
    described = "; ".join(f"{arm.name}, {_ends(*arm.series(band.middle))}" for arm in shown)
    with drawing(band.name, f"{band.title} by step: {described}.") as figure:
        axes = figure.axes[0]
        for arm in shown:
            colour, style = arm_styles(arms)[arm.name]
            low, middle, high = (dict(zip(*arm.series(key), strict=True)) for key in (band.low, band.middle, band.high))
            both = sorted(low.keys() & high.keys())
            steps, bottom = thin(both, [low[step] for step in both])
            top = thin(both, [high[step] for step in both])[1]
            axes.fill_between(steps, bottom, top, color=colour, alpha=0.18, linewidth=0)
            axes.plot(*thin(list(middle), list(middle.values())), style, color=colour, label=arm.name)
        _by_step(axes, band.unit)
        _from_zero(axes, top=1.0 if band.unit == "share" else None)
        if len(shown) > 1:
            legend(figure)
    return Figure(band.title, figure.svg, band.caption)


def _seconds(arms: Sequence[Arm]) -> Figure | None:
    table = {arm.name: [arm.mean(key) or 0.0 for key, _, _ in STAGES] for arm in arms}
    table = {name: seconds for name, seconds in table.items() if sum(seconds) > 0}
    if not table:
        return None
    names = [label for _, label, _ in STAGES]
    described = "; ".join(
        f"{name}: " + ", ".join(f"{label} {value:.3g}" for label, value in zip(names, seconds, strict=True) if value)
        for name, seconds in table.items()
    )
    with drawing("seconds", f"Mean seconds of a step by stage: {described}.", height=1.5 + 0.6 * len(table)) as figure:
        axes = figure.axes[0]
        widths = np.array(list(table.values()))
        starts = np.cumsum(widths, axis=1) - widths
        for stage, (_, label, colour) in enumerate(STAGES):
            axes.barh(list(table), widths[:, stage], left=starts[:, stage], height=0.55, color=colour, label=label)
        for row, total in enumerate(widths.sum(axis=1)):
            axes.annotate(f"{total:.3g} s", (total, row), (5, 0), textcoords="offset points", va="center")
        axes.margins(x=0.14)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlabel("seconds per step")
        figure.canvas.legend(loc="outside upper right", ncols=3, columnspacing=1.2, handlelength=1)
    return Figure("Where the time goes", figure.svg, "Mean wall-clock seconds of each stage, over the logged steps.")


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[Floats, Floats]:
    """A long curve as the means of `_MOST_POINTS` consecutive parts."""
    parts = max(1, min(len(steps), _MOST_POINTS))

    def means(row: Sequence[float]) -> Floats:
        return np.array([part.mean() for part in np.array_split(np.asarray(row, dtype=float), parts) if part.size])

    return means(steps), means(values)


def _ends(steps: Sequence[float] | Floats, values: Sequence[float] | Floats) -> str:
    """A curve in words."""
    if len(steps) == 1:
        return f"{values[0]:.3g} at step {steps[0]:.0f}"
    return f"from {values[0]:.3g} at step {steps[0]:.0f} to {values[-1]:.3g} at step {steps[-1]:.0f}"


def arm_styles(arms: Sequence[Arm]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each arm, by name. TOPD, or an only arm, has the page's accent; OPD is neutral."""
    free = [(GREEN, "-."), (VERMILION, ":"), (PURPLE, "-"), (ORANGE, "--"), (SKY, "-."), (INK, ":")]
    wanted = {"topd": (BLUE, "-"), "opd": (INK, "--")}
    styles: dict[str, tuple[str, str]] = {}
    for index, arm in enumerate(arms):
        method = "topd" if len(arms) == 1 else arm.method.lower()
        styles[arm.name] = wanted.pop(method, free[index % len(free)])
    return styles


def _from_zero(axes: Axes, top: float | None = None) -> None:
    """From 0 (or the least value, if negative) to a little above the highest value."""
    low, high = min(0.0, axes.dataLim.y0), max(axes.dataLim.y1, 0.0)
    axes.set_ylim(low, top or high + 0.06 * (high - low) or 1.0)


def _whole_decades(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale between powers of ten, five decades at most. Linear if nothing is positive."""
    positive = [value for value in values if value > 0]
    if positive:
        high = np.ceil(np.log10(max(positive)) + 1e-9)
        low = max(np.floor(np.log10(min(positive))), high - 5)
        axes.set_yscale("log")
        axes.set_ylim(10**low, 10**high)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _by_step(axes: Axes, unit: str, ticks: int = 5) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
