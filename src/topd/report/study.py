"""A study on the page: accuracy by arm, differences from OPD over paired seeds, learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topd.report.reading import check_version, clean, mapping, mappings, number, read_object
from topd.report.svg import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, Figure, drawing, legend

STUDY_VERSION = 2
"""The newest `study.json` that is understood."""

AXES = (
    ("step", "steps", "step"),
    ("tokens", "tokens", "tokens read and generated"),
    ("seconds", "seconds", "seconds of training"),
)
STYLES = [(INK, "--"), (BLUE, "-"), (GREEN, "-."), (VERMILION, ":"), (PURPLE, "-"), (ORANGE, "--"), (SKY, "-.")]


@dataclass(frozen=True)
class StudyLine:
    """One arm: accuracy and difference from OPD, in percent and points, with 95 % intervals; p after Holm."""

    name: str
    accuracy: str
    difference: str
    p: str
    ahead: str
    options: str


@dataclass(frozen=True)
class StudySection:
    """`tables`: by way of decoding, a line an arm."""

    title: str
    lede: str
    tables: list[tuple[str, list[StudyLine]]]
    figures: list[Figure]


def load_study(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """`study.json` of a folder; None if there is none."""
    result = read_object(folder / "study.json", notes)
    check_version(result, folder / "study.json", STUDY_VERSION)
    return result or None


def study_section(result: Mapping[str, Any], index: int = 0, of: str = "") -> StudySection:
    """`of`: the run's name, where there are several."""
    arms = {clean(name): mapping(arm) for name, arm in mapping(result.get("arms")).items()}
    plan = mapping(result.get("plan"))
    tuned = {clean(name): mapping(options) for name, options in mapping(result.get("tuned")).items()}
    lede = f"{clean(plan.get('student', ''))} beside {clean(plan.get('teacher', ''))}: {len(arms)} arms, each with the "
    lede += f"same seeds, prompts and {number(plan.get('steps')) or 0:.0f} optimizer steps, "
    lede += f"{number(plan.get('held_out')) or 0:,.0f} held-out problems."
    if tuned:
        lede += " Each arm was tuned with as many runs as every other, on other problems."
    return StudySection(
        f"Study{of}",
        lede,
        [(words, [_line(name, mapping(arm.get(how)), tuned.get(name, {})) for name, arm in arms.items()])
         for how, words in (("greedy", "Greedy"), ("sampled", "Sampled, temperature 1"))],
        [figure for axis in AXES if (figure := _curves(arms, *axis, index))],
    )  # fmt: skip


def _line(name: str, found: Mapping[str, Any], tuned: Mapping[str, Any]) -> StudyLine:
    accuracy, beside = mapping(found.get("accuracy")), mapping(found.get("beside_opd"))
    p, seeds = number(beside.get("p_holm")), found.get("seeds") or ()
    ahead = f"{number(beside.get('ahead')) or 0:.0f} of {len(beside.get('seeds') or ())}" if beside else ""
    return StudyLine(
        name,
        _span(accuracy, signed=False),
        _span(beside, signed=True) if beside else "",
        "" if p is None else f"{p:.2g}",
        ahead or f"{len(seeds)} seeds",
        ", ".join(f"{clean(option)} {clean(value)}" for option, value in tuned.items()),
    )


def _span(values: Mapping[str, Any], signed: bool) -> str:
    mean, low, high = (number(values.get(name)) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * mean:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})".replace("-", "−")


def _curves(arms: Mapping[str, Mapping[str, Any]], key: str, name: str, unit: str, index: int) -> Figure | None:
    lines = {}
    for arm, found in arms.items():
        seeds = [_points(curve, key) for curve in mapping(found.get("curve")).values()]
        shortest = min(map(len, seeds), default=0)
        if shortest > 1:
            lines[arm] = np.array([points[:shortest] for points in seeds]).mean(0).T
    if not lines:
        return None
    described = "; ".join(f"{arm} {line[1][0]:.3g} to {line[1][-1]:.3g}" for arm, line in lines.items())
    with drawing(f"study-{name}-{index}", f"Accuracy by {unit}: {described}.", height=3.4) as figure:
        for (colour, style), (arm, (x, y)) in zip(STYLES * len(lines), lines.items(), strict=False):
            figure.axes[0].plot(x, y, style, color=colour, label=arm[:28])
        figure.axes[0].set_xlabel(unit)
        figure.axes[0].set_ylabel("share right, greedy")
        legend(figure)
    caption = "Means over seeds. The problems are in no training set, and nothing is chosen by them."
    return Figure(f"Learning curves by {unit}", figure.svg, caption)


def _points(curve: Any, key: str) -> list[tuple[float, float]]:
    found = [(number(point.get(key)), number(point.get("accuracy"))) for point in mappings(curve)]
    return [(x, y) for x, y in found if x is not None and y is not None]
