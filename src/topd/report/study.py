"""A study on the page: accuracy by arm, differences from OPD over paired seeds, learning curves, tuning, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd.report.reading import check_version, clean, mapping, mappings, number, read_object
from topd.report.study_figures import difference_figure, learning_curves
from topd.report.svg import Figure
from topd.report.words import signed, span
from topd.version import STUDY_VERSION


@dataclass(frozen=True)
class StudyLine:
    """One arm: accuracy and difference from OPD, in percent and points, with 95 % intervals; p, and p after Holm."""

    name: str
    accuracy: str
    difference: str
    p: str
    p_holm: str
    ahead: str


@dataclass(frozen=True)
class Tried:
    """A setting that tuning tried: in words, percent right on the tuning problems, whether it was chosen."""

    words: str
    accuracy: str
    chosen: bool


@dataclass(frozen=True)
class ArmCost:
    """What an arm's runs took, and its tuning.

    Attributes:
        steps, seconds: means over seeds.
        ratio: seconds to OPD's.
        tuned: the chosen setting in words.
        edges: which of its values are the lowest or highest that were tried.
    """

    name: str
    steps: str
    seconds: str
    ratio: str
    tuned: str
    edges: str
    tried: list[Tried]


@dataclass(frozen=True)
class StudySection:
    """`tables`: by way of decoding, a line an arm. `tuned`: whether anything was."""

    title: str
    lede: str
    tables: list[tuple[str, list[StudyLine]]]
    costs: list[ArmCost]
    tuned: bool
    difference: Figure | None
    curves: list[Figure]


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
    tuning = {clean(name): mappings(scores) for name, scores in mapping(result.get("tuning")).items()}
    lede = f"{clean(plan.get('student', ''))} beside {clean(plan.get('teacher', ''))}: {len(arms)} arms, each with the "
    lede += f"same seeds, prompts and {number(plan.get('steps')) or 0:.0f} optimizer steps (unless the table says "
    lede += f"otherwise), {number(plan.get('held_out')) or 0:,.0f} held-out problems."
    if tuned:
        lede += " Each arm was tuned with as many runs as every other, on other problems."
    return StudySection(
        f"Study{of}",
        lede,
        [
            (words, [_line(name, mapping(arm.get(how))) for name, arm in arms.items()])
            for how, words in _ways(plan).items()
        ],
        [_cost(name, arms, tuned.get(name, {}), tuning.get(name, [])) for name in arms],
        bool(tuned),
        difference_figure(arms, index),
        learning_curves(arms, index),
    )


def _ways(plan: Mapping[str, Any]) -> dict[str, str]:
    """Title of the table of each way of decoding. The embedded task is sampled at temperature 1."""
    temperature = mapping(plan.get("sampling")).get("temperature") if plan.get("data") else 1
    known = "" if temperature is None else f", temperature {clean(temperature)}"
    return {"greedy": "Greedy", "sampled": f"Sampled{known}"}


def _line(name: str, found: Mapping[str, Any]) -> StudyLine:
    accuracy, beside = mapping(found.get("accuracy")), mapping(found.get("beside_opd"))
    seeds = found.get("seeds") or ()
    ahead = f"{number(beside.get('ahead')) or 0:.0f} of {len(beside.get('seeds') or ())}" if beside else ""
    return StudyLine(
        name,
        span(accuracy),
        span(beside, signed) if beside else "",
        _p(beside.get("p")),
        _p(beside.get("p_holm")),
        ahead or f"{len(seeds)} seeds",
    )


def _p(value: Any) -> str:
    p = number(value)
    return "" if p is None else f"{p:.2g}"


def _cost(
    name: str, arms: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]
) -> ArmCost:
    seconds, opd = (_mean(mapping(arms.get(one)).get("seconds_training")) for one in (name, "opd"))
    steps = _mean(arms[name].get("steps"))
    tried = []
    for each in scores:
        accuracy, choice = number(each.get("accuracy")), mapping(each.get("choice"))
        tried.append(Tried(_words(choice), "–" if accuracy is None else f"{100 * accuracy:.1f}", choice == tuned))
    return ArmCost(
        name,
        "–" if steps is None else f"{steps:,.0f}",
        "–" if seconds is None else f"{seconds:,.1f}",
        "–" if seconds is None or not opd else f"{seconds / opd:.2f} ×",
        _words(tuned),
        edges(tuned, [mapping(each.get("choice")) for each in scores]),
        tried,
    )


def edges(chosen: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> str:
    """Which numbers of the chosen setting are the lowest or highest of those that were tried: more may do better."""
    found = []
    for option, raw in chosen.items():
        value = number(raw)
        values = {other for choice in choices if (other := number(choice.get(option))) is not None}
        if value is not None and len(values) > 1 and value in (min(values), max(values)):
            found.append(f"{clean(option)}: {'lowest' if value == min(values) else 'highest'}")
    return ", ".join(found)


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{clean(option)} {clean(value)}" for option, value in options.items())


def _mean(by_seed: Any) -> float | None:
    values = [value for each in mapping(by_seed).values() if (value := number(each)) is not None]
    return sum(values) / len(values) if values else None
