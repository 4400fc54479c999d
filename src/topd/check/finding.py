"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "error"]
_ORDER: tuple[Verdict, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: what was looked at.
        verdict: error, the run would fail or surely train towards the wrong thing; warning, look at it.
        found: what is there, in words and numbers.
        remedy: what to do; empty where all is well.
    """

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def worst(findings: Sequence[Finding]) -> Verdict:
    return max((finding.verdict for finding in findings), key=_ORDER.index, default="ok")
