"""A study on the page: accuracy by arm, differences from OPD over paired seeds, learning curves, tuning, seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from topd.report.elements import Figure, Group, Section, Table, joined, p_value, plural, share, signed, span
from topd.report.reading import clean, mapping, mappings, number, read_object
from topd.report.svg import BLUE, INK, Drawing, Estimate, drawing, forest
from topd.version import STUDY_VERSION

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


def load_study(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """`study.json` of a folder; None if there is none."""
    return read_object(folder / "study.json", notes, STUDY_VERSION) or None


def study_section(result: Mapping[str, Any], index: int = 0, of: str = "") -> Section:
    """`index`: of the run on the page; `of`: its name, where there are several."""
    arms = {clean(name): mapping(arm) for name, arm in mapping(result.get("arms")).items()}
    plan = mapping(result.get("plan"))
    tuned = {clean(name): mapping(options) for name, options in mapping(result.get("tuned")).items()}
    tuning = {clean(name): mappings(scores) for name, scores in mapping(result.get("tuning")).items()}
    lede = f"{clean(plan.get('student', ''))} distilled from {clean(plan.get('teacher', ''))}: {len(arms)} arms, each "
    lede += f"with the same seeds, prompts and {number(plan.get('steps')) or 0:.0f} optimizer steps (exceptions are in "
    lede += f"the table), {number(plan.get('held_out')) or 0:,.0f} held-out problems."
    if tuned:
        lede += " All arms were tuned with the same number of runs, on other problems."
    section = Section(f"Study{of}", lede)
    figure = _differences(arms, index)
    section.add("figures", [figure] if figure else [])
    temperature = mapping(plan.get("sampling")).get("temperature") if plan.get("data") else 1  # of the embedded task
    sampled = "Sampled" if temperature is None else f"Sampled, temperature {clean(temperature)}"
    for how, words in (("greedy", "Greedy"), ("sampled", sampled)):
        section.add("table", _accuracies(words, {name: mapping(arm.get(how)) for name, arm in arms.items()}))
    section.add("table", _costs(arms, tuned, tuning))
    section.add("tried", [(name, _tried(tuning[name], tuned.get(name, {}))) for name in arms if tuning.get(name)])
    return section.add("figures", [figure for axis in AXES if (figure := _curves(arms, *axis, index))])


def _accuracies(words: str, arms: Arms) -> Table:
    rows = []
    for name, found in arms.items():
        compared = mapping(found.get("beside_opd"))
        ahead = f"{number(compared.get('ahead')) or 0:.0f} of {len(compared.get('seeds') or ())}" if compared else ""
        rows.append((
            name, span(found.get("accuracy")), span(compared, signed) if compared else "",
            p_value(compared.get("p")), p_value(compared.get("p_holm")),
            ahead or plural(len(found.get("seeds") or ()), "seed"),
        ))  # fmt: skip
    return Table(
        f"Table of the study, {words}", ("", "Accuracy", "Minus OPD", "p", "p (Holm)", "Seeds ahead"), [Group(rows)],
        f"{words}: percent solved, 95 % intervals over seeds and problems. Difference from OPD: same seeds and "
        "problems, p by random signs of seeds, corrected for the number of comparisons (Holm).",
    )  # fmt: skip


def _costs(arms: Arms, tuned: Arms, tuning: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    rows = []
    opd = _mean(mapping(arms.get(_REFERENCE)).get("seconds_training"))
    for name, arm in arms.items():
        seconds, steps = _mean(arm.get("seconds_training")), _mean(arm.get("steps"))
        row = [
            name,
            "–" if steps is None else f"{steps:,.0f}",
            "–" if seconds is None else f"{seconds:,.1f}",
            "–" if seconds is None or not opd else f"{seconds / opd:.2f} ×",
        ]
        if tuned:
            choice = tuned.get(name, {})
            tried = [mapping(each.get("choice")) for each in tuning.get(name, ())]
            row += [joined({clean(key): clean(value) for key, value in choice.items()}), edges(choice, tried)]
        rows.append(row)
    caption = "Optimizer steps and seconds of training, means over seeds (processor seconds where there is no GPU)."
    if tuned:
        caption += " <b>At the edge</b>: the chosen value is the lowest or highest of the grid; a value beyond it may "
        caption += "be better."
    head = ("", "Steps", "Seconds", "Relative to OPD", *(("Tuned to", "At the edge") if tuned else ()))
    return Table("Table of time and tuning", head, [Group(rows)], Markup(caption))


def _tried(scores: Sequence[Mapping[str, Any]], tuned: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Each setting that tuning tried: in words, percent solved, whether it was chosen."""
    found = []
    for each in scores:
        accuracy, choice = number(each.get("accuracy")), mapping(each.get("choice"))
        words = joined({clean(key): clean(value) for key, value in choice.items()})
        found.append((words, share(accuracy), choice == tuned))
    return found


def edges(chosen: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> str:
    """Which numbers of the chosen setting are the lowest or highest of those that were tried."""
    found = []
    for option, raw in chosen.items():
        value = number(raw)
        values = {other for choice in choices if (other := number(choice.get(option))) is not None}
        if value is not None and len(values) > 1 and value in (min(values), max(values)):
            found.append(f"{clean(option)}: {'lowest' if value == min(values) else 'highest'}")
    return ", ".join(found)


def _mean(by_seed: Any) -> float | None:
    values = [value for each in mapping(by_seed).values() if (value := number(each)) is not None]
    return sum(values) / len(values) if values else None


def _differences(arms: Arms, index: int) -> Figure | None:
    rows: dict[str, dict[str, Estimate]] = {}
    for name, arm in arms.items():
        for how in ("greedy", "sampled"):
            compared = mapping(mapping(arm.get(how)).get("beside_opd"))
            found = [100 * value for key in ("mean", "low", "high") if (value := number(compared.get(key))) is not None]
            if len(found) == 3:
                rows.setdefault(name, {})[how] = (found[0], found[1], found[2])
    if not rows:
        return None
    described = "; ".join(f"{name}, {how} {signed(found[how][0])}" for name, found in rows.items() for how in found)
    alt = f"Difference from OPD in points: {described}."
    svg = forest(f"study-forest-{index}", alt, rows, "points minus OPD", width=_WIDTH)
    caption = "Same seeds, prompts and problems; 95 % intervals over seeds and problems, not corrected for the number "
    caption += "of comparisons. Filled: the interval excludes 0."
    return Figure("Difference from OPD", svg, caption, wide=True)


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
                if arm == panels[0]:
                    end = np.mean(curves[_REFERENCE], axis=0)[:, -1]
                    above = end[1] >= np.interp(end[0], *np.mean(curves[arm], axis=0))
                    axes.annotate(
                        "OPD", end, (0, 6 if above else -6), textcoords="offset points", ha="right",
                        va="bottom" if above else "top",
                    )  # fmt: skip
            axes.set_title(arm if len(arm) <= 30 else f"{arm[:29]}…", loc="left", fontsize=9)
        _label(figure, len(panels), columns, key, unit)
    caption = (
        "Solid: the arm; dashed: OPD. Means over seeds, single seeds thin. These problems are not used for training "
    )
    caption += "or for tuning."
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
    figure.canvas.supylabel("share solved, greedy", fontsize=9, color=INK)


def _seeds(curves: Any, key: str) -> list[NDArray[np.float64]]:
    """[2, point] of each seed, as many points as the shortest has; none if that is one."""
    found = [
        [(x, y) for point in mappings(curve)
         if (x := number(point.get(key))) is not None and (y := number(point.get("accuracy"))) is not None]
        for curve in mapping(curves).values()
    ]  # fmt: skip
    shortest = min(map(len, found), default=0)
    return [np.array(points[:shortest]).T for points in found] if shortest > 1 else []
