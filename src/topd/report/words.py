"""Numbers as the page writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from topd.report.reading import number


def plain(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def signed(value: float) -> str:
    """One decimal, always with a sign."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # never -0.0


def span(values: Mapping[str, Any], form: Callable[[float], str] = plain) -> str:
    """A share in percent with its interval, or with `signed` a difference in points; a dash where a part is missing."""
    mean, low, high = (number(values.get(name)) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "–"
    return f"{form(100 * mean)} ({form(100 * low)} to {form(100 * high)})"
