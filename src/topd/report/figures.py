"""The figures of training: curves by step, and seconds by stage. What has no data is left out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from topd.report.elements import Figure
from topd.report.reading import number
from topd.report.records import Arm
from topd.report.svg import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, drawing, label_lines

Floats = NDArray[np.float64]

QUANTILES = (("token_loss/q99", "99 %", ":"), ("token_loss/q90", "90 %", "--"), ("token_loss/q50", "50 %", "-"))
STAGES = {
    "rollout": SKY, "scoring": BLUE, "windows": ORANGE, "calibration": INK, "transport": PURPLE, "loss": GREEN,
    "backward": VERMILION,
}  # fmt: skip
_MOST_POINTS = 300
"""A longer curve is drawn as the means of so many equal parts."""
_NEAR_ZERO = 0.3
"""An axis starts at 0 where the lowest value is below this share of the highest; otherwise the change is shown."""


CURVES = (
    (
        "loss", "token_loss/mean", "Token loss", "nats",
        "{direction} over the full vocabulary, mean over all response tokens of the student's rollouts in a step.",
    ),
    (
        "forward-kl", "forward_kl", "Forward KL", "nats",
        "KL(teacher ‖ student) of the warm start, mean over the tokens of the teacher's solutions in a step.",
    ),
    (
        "cross-entropy", "cross_entropy", "Cross-entropy", "nats",
        "Mean negative log-probability that the student gives to the tokens of the solutions in a step.",
    ),
    (
        "eval-loss", "eval_loss", "Evaluation loss", "nats",
        "The trainer's evaluation loss on the evaluation data set, at each evaluation.",
    ),
    (
        "accuracy", "eval_accuracy", "Accuracy", "share",
        "Share of held-out problems solved during training. Band: 95 % interval over problems.",
        ("eval_accuracy_low", "eval_accuracy_high"),
    ),
    (
        "distance", "distance/q50", "Transport distance of candidates", "D_OT",
        "Median D_OT between the student's and the teacher's next tokens, over all candidates of a step. Band: the "
        "middle half of the candidates.",
        ("distance/q25", "distance/q75"),
    ),
    (
        "alarms", "false_alarm_share", "False alarms among candidates", "share",
        "Share of all candidates of a step that are not forks. With fork_rule batch_quantile the rule fixes this "
        "share; with the other rules it is a measurement.",
    ),
    (
        "own-token", "guidance/own_token_share", "Own-token share", "share",
        "Share of the guidance target that is the student's own token. This part only sharpens the student.",
    ),
    (
        "guidance-loss", "guidance/loss", "Guidance loss", "nats",
        "KL(aligned target ‖ student), mean over guided window positions, before it is multiplied by λ.",
    ),
    (
        "length", "completions/mean_length", "Response length", "tokens",
        "Mean length of the student's responses. A sudden change often explains a change of the loss.",
    ),
)  # fmt: skip
"""Of each: the arguments of `_curve`."""


def curve_figures(arms: Sequence[Arm]) -> list[Figure]:
    figures = [_curve(arms, *curve) for curve in CURVES]
    return [figure for figure in [figures[0], _quantiles(arms), *figures[1:], _seconds(arms)] if figure]


def _curve(
    arms: Sequence[Arm], name: str, key: str, title: str, unit: str, caption: str, band: tuple[str, ...] = ()
) -> Figure | None:
    """One metric by step, one line per arm; `band`: the metrics of its lower and upper bound."""
    shown = [arm for arm in arms if arm.series(key)[0]]
    if not shown:
        return None
    lines = {arm.name: thin(*arm.series(key)) for arm in shown}
    described = "; ".join(f"{arm} {_ends(*line)}" for arm, line in lines.items())
    with drawing(name, f"{title} by training step, in {unit}: {described}.") as figure:
        axes = figure.axes[0]
        for arm in shown:
            colour, style = arm_styles(arms)[arm.name]
            if band:
                low, high = (dict(zip(*arm.series(bound), strict=True)) for bound in band)
                both = sorted(low.keys() & high.keys())
                steps, bottom = thin(both, [low[step] for step in both])
                top = thin(both, [high[step] for step in both])[1]
                axes.fill_between(steps, bottom, top, color=colour, alpha=0.16, linewidth=0)
            line = lines[arm.name]
            axes.plot(*line, style, color=colour, marker="o", markersize=2.5 if len(line[0]) < 4 else 0)
        _by_step(axes, unit)
        from_zero = _fit(axes, top=1.0 if unit == "share" else None)
        if len(arms) > 1:
            label_lines(axes, [(line[1][-1], arm, arm_styles(arms)[arm][0]) for arm, line in lines.items()])
    forward = any(number(arm.options.get("beta")) == 0 for arm in arms)
    caption = caption.format(direction="KL(teacher ‖ student)" if forward else "KL(student ‖ teacher)")
    return Figure(title, figure.svg, caption if from_zero else f"{caption} The vertical axis does not start at 0.")


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
        everything = [value for arm in shown for key, _, _ in QUANTILES for value in arm.series(key)[1]]
        for arm, axes in zip(shown, figure.axes, strict=True):
            colour, _ = arm_styles(arms)[arm.name]
            ends = []
            for key, label, style in QUANTILES:
                steps, values = thin(*arm.series(key))
                axes.plot(steps, values, style, color=colour)
                ends += [(values[-1], label, INK)] if len(values) else []
            axes.set_title(arm.name if len(arms) > 1 else "", loc="left", fontsize=9)
            axes.tick_params(axis="y", which="minor", length=0)
            _by_step(axes, "nats" if axes is figure.axes[0] else "", ticks=5 if len(shown) == 1 else 3)
            _whole_decades(axes, everything)
            if axes is figure.axes[-1]:
                label_lines(axes, ends)
    return Figure(
        "Token loss, quantiles",
        figure.svg,
        "50 %, 90 % and 99 % of the tokens of a step have a loss below these lines (logarithmic scale).",
    )


def _seconds(arms: Sequence[Arm]) -> Figure | None:
    table = {arm.name: [arm.mean(f"seconds/{stage}") or 0.0 for stage in STAGES] for arm in arms}
    table = {name: seconds for name, seconds in table.items() if sum(seconds) > 0}
    if not table:
        return None
    described = "; ".join(
        f"{name}: " + ", ".join(f"{stage} {value:.3g}" for stage, value in zip(STAGES, seconds, strict=True) if value)
        for name, seconds in table.items()
    )
    with drawing("seconds", f"Mean seconds per step by stage: {described}.", height=1.5 + 0.6 * len(table)) as figure:
        axes = figure.axes[0]
        widths = np.array(list(table.values()))
        starts = np.cumsum(widths, axis=1) - widths
        for stage, (label, colour) in enumerate(STAGES.items()):
            if widths[:, stage].any():
                axes.barh(list(table), widths[:, stage], left=starts[:, stage], height=0.55, color=colour, label=label)
        for row, total in enumerate(widths.sum(axis=1)):
            axes.annotate(f"{total:.3g} s", (total, row), (5, 0), textcoords="offset points", va="center")
        axes.margins(x=0.14)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlabel("seconds per step")
        figure.canvas.legend(loc="outside upper right", ncols=3, columnspacing=1.2, handlelength=1)
    return Figure("Time per step", figure.svg, "Mean wall-clock seconds of each stage, over all logged steps.")


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[Floats, Floats]:
    """A long curve as the means of `_MOST_POINTS` consecutive parts."""
    parts = max(1, min(len(steps), _MOST_POINTS))

    def means(row: Sequence[float]) -> Floats:
        return np.array([part.mean() for part in np.array_split(np.asarray(row, dtype=float), parts) if part.size])

    return means(steps), means(values)


def _ends(steps: Sequence[float] | Floats, values: Sequence[float] | Floats) -> str:
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


def _fit(axes: Axes, top: float | None = None) -> bool:
    """Limits that show the change; `top`: the highest possible value. Return whether 0 is within them."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    room = 0.06 * (high - min(low, 0.0) if low < _NEAR_ZERO * high else high - low) or 0.1 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low < _NEAR_ZERO * high or low == high == 0 else low - room
    axes.set_ylim(bottom, min(high + room, top) if top is not None and high <= top else high + room)
    return bottom <= 0


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
