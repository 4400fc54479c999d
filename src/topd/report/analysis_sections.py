"""What the page says about a probe and about local correction: numbers beside the paper's, tables, cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from topd.paper import CORRELATIONS, GROUPS, LOCAL_CORRECTION, NEAR_ZERO, NEAR_ZERO_SHARES, PROBE
from topd.report.analyses import Case, CorrectRecords, ProbeRecords
from topd.report.analysis_figures import correct_figure, probe_figures
from topd.report.reading import clean, mapping, mappings, number
from topd.report.rollouts import visible
from topd.report.svg import Figure

MEASURES = {
    "distance": "D_OT to the teacher's window",
    "teacher_log_likelihood": "Teacher's log-likelihood of the window, nats a token",
    "agreement": "Share of tokens equal to the teacher's",
    "right": "Share of continuations that end right",
}
MOST_CASES = 40
MOST_TOKENS = 24


@dataclass(frozen=True)
class Line:
    """A value with its interval (texts, empty where not known), and the paper's for its own pair."""

    name: str
    value: str
    interval: str
    paper: str


@dataclass(frozen=True)
class ProbeSection:
    """Attributes:
    readings: headings (readings of the student's window, the paper), then a row per quantity; none for one reading.
    variants: name, then medians of the three groups, false-alarm share, Pearson, Spearman.
    tokens: token, times it had a high loss, times it was a false alarm, the same as a percentage.
    """

    title: str
    lede: str
    lines: list[Line]
    readings: list[tuple[str, ...]]
    variants: list[tuple[str, ...]]
    tokens: list[tuple[str, int, int, float]]
    figures: list[Figure]


@dataclass(frozen=True)
class ArmLine:
    """One arm of one measure: mean, interval, quartiles, difference from OPD with p, the paper's mean."""

    name: str
    mean: str
    interval: str
    quartiles: str
    difference: str
    p: str
    paper: str


@dataclass(frozen=True)
class Strip:
    """A window token by token; True: the token is the teacher's too, in the same order."""

    name: str
    note: str
    tokens: list[tuple[str, bool]]


@dataclass(frozen=True)
class CaseText:
    """A fork as the page shows it."""

    title: str
    prefix: str
    strips: list[Strip]


@dataclass(frozen=True)
class CorrectSection:
    """`measures`: each with a line an arm. `left_out` cases are in the records, not on the page."""

    title: str
    lede: str
    measures: list[tuple[str, list[ArmLine]]]
    figure: Figure | None
    cases: list[CaseText]
    left_out: int


def probe_section(probe: ProbeRecords, index: int = 0, of: str = "") -> ProbeSection:
    """`of`: the run's name, where there are several."""
    result = probe.result
    run = mapping(result.get("run"))
    groups = mapping(result.get("groups"))
    lines = [
        _line(f"Median D_OT, {words} (n = {n:.0f})", mapping(groups.get(group)), "median", PROBE[group])
        for group, words in GROUPS.items()
        if (n := number(mapping(groups.get(group)).get("n"))) is not None
    ]
    lines += [
        _line(
            f"D_OT below {NEAR_ZERO}, {words}, %", _percent(mapping(groups.get(group)).get("near_zero")), "value",
            100 * NEAR_ZERO_SHARES[group], digits=1,
        )
        for group, words in GROUPS.items()
    ]  # fmt: skip
    for name, words in CORRELATIONS.items():
        lines.append(_line(words, mapping(result.get(name)), "value", PROBE[name.removesuffix("_nll")]))
    alarms = _percent(result.get("false_alarm_share"))
    lines.append(
        _line("False alarms among high-loss tokens, %", alarms, "value", 100 * PROBE["false_alarm_share"], digits=1)
    )
    threshold = number(result.get("threshold"))
    lede = f"{clean(run.get('student', ''))} beside {clean(run.get('teacher', ''))}: "
    lede += f"{number(result.get('rollouts')) or 0:.0f} rollouts, before any training."
    if threshold is not None:
        lede += f" Three quarters of the low-loss places have a D_OT of at most {threshold:.4g}; a high-loss token "
        lede += "below is a false alarm."
    return ProbeSection(
        title=f"Probe{of}",
        lede=lede,
        lines=[line for line in lines if line.value != "–"],
        readings=_readings(result),
        variants=[_variant(clean(name), mapping(found)) for name, found in mapping(result.get("variants")).items()],
        tokens=_tokens(result),
        figures=probe_figures(probe, index),
    )


def correct_section(correct: CorrectRecords, index: int = 0, of: str = "") -> CorrectSection:
    """`of`: the run's name, where there are several."""
    measures = mapping(correct.result.get("measures"))
    steps = "" if correct.steps is None else f"{correct.steps} "
    forks = number(correct.result.get("forks")) or 0
    return CorrectSection(
        title=f"Local correction{of}",
        lede=f"At each of {forks:.0f} forks the student takes {steps}gradient steps on that one window, each time from "
        "the same weights, and then goes on from the same prefix again. TOPD trains on the plan that defines D_OT, so "
        "the other measures, which no loss here looks at, say more.",
        measures=[
            (words, _arm_lines(mapping(measures[name]), LOCAL_CORRECTION if name == "distance" else {}))
            for name, words in MEASURES.items()
            if name in measures
        ],
        figure=correct_figure(correct, index),
        cases=[case_text(case) for case in correct.cases[:MOST_CASES]],
        left_out=max(0, len(correct.cases) - MOST_CASES),
    )


def case_text(case: Case) -> CaseText:
    """The teacher's window and each of the student's, one strip each."""
    strips = [Strip("teacher", "", [(visible(token), True) for token in case.teacher])]
    for window in case.windows:
        shared = SequenceMatcher(None, case.teacher, window.tokens, autojunk=False).get_matching_blocks()
        same = {place for block in shared for place in range(block.b, block.b + block.size)}
        note = "" if window.distance is None else f"D_OT {window.distance:.3f}"
        note += "" if window.right is None else ", ends right" if window.right else ", ends wrong"
        tokens = [(visible(token), place in same) for place, token in enumerate(window.tokens)]
        strips.append(Strip(window.name, note, tokens))
    prefix = case.prefix if len(case.prefix) <= 240 else f"…{case.prefix[-240:]}"
    return CaseText(f"Rollout {case.rollout + 1}, token {case.position + 1}", prefix, strips)


def _arm_lines(measure: Mapping[str, Any], paper: Mapping[str, float]) -> list[ArmLine]:
    beside = mapping(measure.get("beside_opd"))
    lines = []
    for arm, found in mapping(measure.get("arms")).items():
        row, other = _numbers(found), _numbers(beside.get(arm))
        lines.append(
            ArmLine(
                clean(arm),
                _text(row.get("mean")),
                _span(row),
                " · ".join(_text(row.get(name), 2) for name in ("q1", "median", "q3")),
                f"{other['mean']:+.3f}".replace("-", "−") if "mean" in other else "",
                f"{other['p']:.2g}" if "p" in other else "",
                f"{paper[arm]:.3f}" if arm in paper else "",
            )
        )
    return lines


def _line(name: str, found: Mapping[str, Any], key: str, paper: float, digits: int = 3) -> Line:
    values = _numbers(found)
    return Line(name, _text(values.get(key), digits), _span(values, digits), f"{paper:.{digits}f}")


def _readings(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Each reading of the student's window at the same places, and the paper's figures."""
    variants = mapping(result.get("variants"))
    readings = {clean(kind): mapping(variants.get(name)) for kind, name in mapping(result.get("readings")).items()}
    if len(readings) < 2:
        return []
    rows: list[tuple[str, ...]] = [("", *readings, "Paper")]

    def add(words: str, found: list[dict[str, float]], paper: str, digits: int) -> None:
        if any("value" in each for each in found):
            rows.append((words, *(_with_span(each, digits) for each in found), paper))

    in_groups = {group: [mapping(mapping(each.get("groups")).get(group)) for each in readings.values()]
                 for group in GROUPS}  # fmt: skip
    for group, words in GROUPS.items():
        near = [_percent(each.get("near_zero")) for each in in_groups[group]]
        add(f"D_OT below {NEAR_ZERO}, {words}, %", near, f"{100 * NEAR_ZERO_SHARES[group]:.1f}", 1)
    for group, words in GROUPS.items():
        medians = [_numbers(each) for each in in_groups[group]]
        medians = [each | {"value": each["median"]} if "median" in each else {} for each in medians]
        add(f"Median D_OT, {words}", medians, f"{PROBE[group]:.3f}", 3)
    alarms = [_percent(each.get("false_alarm_share")) for each in readings.values()]
    add("False alarms, %", alarms, f"{100 * PROBE['false_alarm_share']:.1f}", 1)
    for group, words in GROUPS.items():
        begins = [_percent(each.get("begins_with_candidate")) for each in in_groups[group]]
        add(f"Begins with the candidate, {words}, %", begins, "", 1)
    return rows


def _variant(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    groups = mapping(found.get("groups"))
    medians = [_text(number(mapping(groups.get(group)).get("median"))) for group in GROUPS]
    share = number(mapping(found.get("false_alarm_share")).get("value"))
    values = [_text(number(mapping(found.get(key)).get("value"))) for key in ("pearson", "spearman")]
    return (name, *medians, _text(None if share is None else 100 * share, 1), *values)


def _tokens(result: Mapping[str, Any]) -> list[tuple[str, int, int, float]]:
    rows = []
    for entry in mappings(result.get("tokens"))[:MOST_TOKENS]:
        n, alarms = int(number(entry.get("n")) or 0), int(number(entry.get("false_alarms")) or 0)
        if n:
            rows.append((visible(clean(entry.get("token", ""))), n, alarms, 100 * alarms / n))
    return sorted(rows, key=lambda row: (-row[3], -row[1]))


def _numbers(found: Any) -> dict[str, float]:
    return {name: value for name, raw in mapping(found).items() if (value := number(raw)) is not None}


def _percent(found: Any) -> dict[str, float]:
    return {name: 100 * value for name, value in _numbers(found).items()}


def _with_span(values: Mapping[str, float], digits: int) -> str:
    span = _span(values, digits)
    return _text(values.get("value"), digits) + (f" ({span})" if span else "") if "value" in values else ""


def _text(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _span(values: Mapping[str, float], digits: int = 3) -> str:
    known = "low" in values and "high" in values
    return f"{_text(values['low'], digits)} to {_text(values['high'], digits)}" if known else ""
