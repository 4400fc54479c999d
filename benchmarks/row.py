"""`Row`: one comparison, one line of the table, one object of the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.measure import Timing

OURS = "ours"


@dataclass
class Row:
    """Ours beside one other side. What was not measured is None.

    Attributes:
        case: name of the case.
        beside: the other side.
        measure: what the ratio is of: "time", "peak memory", ...
        size: in words, such as "V=32768 T=1024".
        what: one line on what is measured.
        ratio: ours / beside; of time, the median of the repeats' ratios.
        gate: the ratio may not exceed it; None where the row is only informative.
        ok: whether it passed; None without a gate or where nothing was measured.
        spread: lower and upper quartile of the repeats' ratios.
        repeats: how many.
        seconds, bytes, errors: {"ours": ..., "beside": ...}, medians where there are repeats.
        parity: the difference that was checked before, in words.
        note: what the reader must know besides.
        error: why there is no number, or None.
    """

    case: str
    beside: str
    measure: str = "time"
    size: str = ""
    what: str = ""
    ratio: float | None = None
    gate: float | None = None
    ok: bool | None = None
    spread: tuple[float, float] | None = None
    repeats: int | None = None
    seconds: dict[str, float] | None = None
    bytes: dict[str, float] | None = None
    errors: dict[str, float] | None = None
    parity: str | None = None
    note: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.ok is None and self.gate is not None and self.ratio is not None:
            self.ok = self.ratio <= self.gate


def time_row(case: str, beside: str, timing: Timing, *, ours: str = OURS, **fields: object) -> Row:
    """Sides `ours` and `beside` of one interleaved timing."""
    seconds = {"ours": timing.median(ours), "beside": timing.median(beside)}
    known = {"ratio": timing.ratio(ours, beside), "spread": timing.spread(ours, beside), "repeats": timing.repeats}
    return Row(case, beside, seconds=seconds, **known, **fields)  # type: ignore[arg-type]


def memory_row(case: str, beside: str, peaks: Mapping[str, int], **fields: object) -> Row:
    """Peaks of fresh processes, by side."""
    ours, other = peaks[OURS], peaks[beside]
    sides: dict[str, float] = {"ours": ours, "beside": other}
    return Row(case, beside, "peak memory", ratio=ours / other, bytes=sides, repeats=1, **fields)  # type: ignore[arg-type]


def missing_row(case: str, beside: str, install: str, **fields: object) -> Row:
    """A peer that is not installed."""
    return Row(case, beside, note=f"not installed: pip install {install}", **fields)  # type: ignore[arg-type]
