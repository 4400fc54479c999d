"""What sections are made of (text, tables, figures), and numbers as the page writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topd.report.reading import number


@dataclass(frozen=True)
class Score:
    """A share in percent, or with `signed` a difference in points; interval and p are None where not recorded."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    signed: bool = False


Row = Sequence[str | Score | None]
"""Cells, the row's header first."""


@dataclass(frozen=True)
class Group:
    """Rows of a table under an optional heading. `style`: "paper" for the paper's figures, "total" for a last line."""

    rows: Sequence[Row]
    heading: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways where it is too wide."""

    label: str  # its name for screen readers
    head: Sequence[str]  # column headings, the first one over the row headers
    groups: Sequence[Group]
    caption: str = ""  # may hold markup of ours
    paper: bool = False  # the last column holds the paper's figures

    @property
    def scores(self) -> bool:
        """Whether cells are scores, which are drawn on a scale."""
        return any(isinstance(cell, Score) for group in self.groups for row in group.rows for cell in row)


@dataclass(frozen=True)
class Figure:
    """A finished figure: `svg` carries its own text alternative, `caption` says what, in which unit, estimated how.

    `wide`: it takes the whole width of the page, and scrolls sideways on a narrow one.
    """

    title: str
    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page. `blocks`: (name of the macro in `elements.html` that draws it, its data)."""

    title: str
    lede: str = ""
    blocks: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, kind: str, data: Any) -> Section:
        """Append a block, unless there is nothing in it."""
        if data and (not isinstance(data, Table) or any(group.rows for group in data.groups)):
            self.blocks.append((kind, data))
        return self

    @property
    def id(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def decimals(value: float | None, digits: int = 3) -> str:
    """With a true minus sign; a dash where not known."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def plain(value: float | None) -> str:
    return decimals(value, 1)


def share(value: float | None) -> str:
    """In percent, with one decimal."""
    return plain(None if value is None else 100 * value)


def signed(value: float) -> str:
    """One decimal, always with a sign."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # never -0.0


def p_value(value: Any) -> str:
    """Two digits; empty where not known."""
    p = number(value)
    return "" if p is None else f"{p:.2g}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def interval_of(values: Mapping[str, Any], form: Callable[[float], str] = decimals) -> str:
    """0.20 to 0.30; empty where not known."""
    low, high = number(values.get("low")), number(values.get("high"))
    return "" if low is None or high is None else f"{form(low)} to {form(high)}"


def with_interval(values: Mapping[str, Any], form: Callable[[float], str] = decimals, key: str = "value") -> str:
    """0.25 (0.20 to 0.30); empty where there is no value."""
    value, interval = number(values.get(key)), interval_of(values, form)
    return "" if value is None else form(value) + (f" ({interval})" if interval else "")


def span(values: Any, form: Callable[[float], str] = plain) -> str:
    """A share in percent with its interval, or with `signed` a difference in points; a dash where not known."""
    return with_interval(percent(values), form, "mean") or "–"


def numbers(found: Any) -> dict[str, float]:
    found = found if isinstance(found, dict) else {}
    return {name: value for name, raw in found.items() if (value := number(raw)) is not None}


def percent(found: Any) -> dict[str, float]:
    """The same, times 100."""
    return {name: 100 * value for name, value in numbers(found).items()}


def joined(options: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())
