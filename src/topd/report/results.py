"""What a run achieved, beside what the paper reports for its own pair and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from topd.paper import MEAN, PROBE, TABLE_1
from topd.report.reading import mapping, mappings, number
from topd.report.runs import Run
from topd.report.words import plain, signed

_STUDENT, _OPD, _TOPD = (row[MEAN] for row in TABLE_1.values())
PAPER_SCORES = {"student": _STUDENT, "opd": _OPD, "opd-capped": 48.2, "topd": _TOPD}
"""Percent, mean of AIME24, AIME25 and HMMT25-Feb (Tables 1 and 2 of the paper). Another pair, another task."""
PAPER_FALSE_ALARMS = f"{100 * PROBE['false_alarm_share']:.2f} %"
PAPER_OVERHEAD = "1.41 ×"
NAMES = {
    "teacher": "Teacher",
    "student": "Student, before training",
    "opd": "OPD",
    "opd-capped": "OPD, false alarms capped",
    "topd": "TOPD",
}


@dataclass(frozen=True)
class Score:
    """A share with its interval, in percent; `low` and `high` are None where there is no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the results: `name`, this run's scores, the paper's (percent)."""

    name: str
    greedy: Score | None
    sampled: Score | None
    paper: float | None


@dataclass(frozen=True)
class Headline:
    """A number in large type: `detail` is its interval or test, `paper` what the paper reports for its own setting."""

    label: str
    value: str
    detail: str
    paper: str


@dataclass(frozen=True)
class Scores:
    """What one run achieved: `title`, large numbers, a table, TOPD minus OPD by decoding, the number of problems."""

    title: str
    headlines: list[Headline]
    rows: list[Row]
    difference: dict[str, dict[str, float]]
    problems: int | None

    @classmethod
    def of(cls, run: Run, several: bool) -> Scores:
        """From `results.json`; the title names the run where there are several."""
        found = run.results
        title = f"Results: {run.name}" if several else "Results"
        return cls(title, headlines(found), score_rows(found), difference_row(found), problems(found))

    @property
    def any(self) -> bool:
        """Whether there is something to show."""
        return bool(self.headlines or self.rows)


def headlines(results: Mapping[str, Any]) -> list[Headline]:
    """The few numbers that a reader came for."""
    found = []
    difference = mapping(mapping(results.get("difference")).get("greedy"))
    if (mean := number(difference.get("mean"))) is not None:
        p = number(difference.get("p"))
        detail = _interval(difference, signed) + ("" if p is None else f", p = {p:.2g}")
        gain = PAPER_SCORES["topd"] - PAPER_SCORES["opd"]
        found.append(
            Headline(
                "TOPD over OPD, greedy", f"{signed(100 * mean)} points", detail.lstrip(", "), f"{signed(gain)} points"
            )
        )
    alarms = mapping(results.get("false_alarm_share"))
    if (value := number(alarms.get("value"))) is not None:
        found.append(
            Headline("False alarms among candidates", f"{100 * value:.1f} %", _interval(alarms), PAPER_FALSE_ALARMS)
        )
    if (overhead := number(results.get("overhead"))) is not None:
        found.append(Headline("Time of a step, TOPD to OPD", f"{overhead:.2f} ×", "", PAPER_OVERHEAD))
    return found


def score_rows(results: Mapping[str, Any]) -> list[Row]:
    """Teacher, student and arms beside the paper's; empty if nothing was evaluated."""
    arms = {str(arm.get("name")): arm for arm in mappings(results.get("arms"))}
    scored = {name: mapping(results.get(name)) for name in ("teacher", "student")} | arms
    rows = []
    for name in dict.fromkeys(("teacher", "student", *PAPER_SCORES, *arms)):
        entry = scored.get(name, {})
        row = Row(
            NAMES.get(name, name), score(entry.get("greedy")), score(entry.get("sampled")), PAPER_SCORES.get(name)
        )
        if row.greedy or row.sampled or row.paper:
            rows.append(row)
    return rows if any(row.greedy or row.sampled for row in rows) else []


def difference_row(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """TOPD minus OPD by way of decoding: mean, low and high in points, p as it is."""
    found = {}
    for decoding in ("greedy", "sampled"):
        entry = mapping(mapping(results.get("difference")).get(decoding))
        values = {key: value for key in ("mean", "low", "high", "p") if (value := number(entry.get(key))) is not None}
        if "mean" in values:
            found[decoding] = {key: value if key == "p" else 100 * value for key, value in values.items()}
    return found


def problems(results: Mapping[str, Any]) -> int | None:
    """How many problems the arms were evaluated on, if all on equally many."""
    counts = {number(mapping(arm.get("greedy")).get("n")) for arm in mappings(results.get("arms"))}
    count = counts.pop() if len(counts) == 1 else None
    return None if count is None else int(count)


def score(value: Any) -> Score | None:
    """A share, bare or with its interval."""
    if isinstance(value, dict):
        mean, low, high = (number(value.get(key)) for key in ("mean", "low", "high"))
        if mean is None or low is None or high is None:
            return score(mean)
        return Score(100 * mean, 100 * low, 100 * high)
    mean = number(value)
    return None if mean is None else Score(100 * mean)


def _interval(entry: Mapping[str, Any], form: Callable[[float], str] = plain) -> str:
    low, high = number(entry.get("low")), number(entry.get("high"))
    if low is None or high is None:
        return ""
    return f"95 % interval {form(100 * low)} to {form(100 * high)}"
