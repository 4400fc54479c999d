"""What a check found and how to fix it; as a table, as one line, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from topd.visible import visible

Verdict = Literal["ok", "warning", "error"]
_ORDER: tuple[Verdict, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str  # its name
    verdict: Verdict  # error: the run would fail or train wrongly; warning: worth a look
    found: str  # with numbers
    remedy: str = ""  # what to do; empty for "ok"


# What a check returns; the table of checks adds its name.


def ok(found: str) -> Finding:
    return Finding("", "ok", found)


def warns(found: str, remedy: str) -> Finding:
    return Finding("", "warning", found, remedy)


def fails(found: str, remedy: str) -> Finding:
    return Finding("", "error", found, remedy)


def failure(message: object) -> Finding:
    """An error from a message: its first sentence is what was found, the rest the remedy."""
    found, _, remedy = str(message).partition(". ")
    return fails(found, remedy)


def worst(findings: Sequence[Finding]) -> Verdict:
    return max((finding.verdict for finding in findings), key=_ORDER.index, default="ok")


_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    table = Table(
        "check", "verdict", "found", "what to do", title=escape(visible(title)), title_justify="left", show_lines=True
    )
    for finding in findings:
        verdict = Text(finding.verdict, _COLOURS[finding.verdict])
        table.add_row(
            Text(visible(finding.check)), verdict, Text(visible(finding.found)), Text(visible(finding.remedy))
        )
    return table


def verdict_line(findings: Sequence[Finding]) -> str:
    for verdict, words in (("error", "Check failed:"), ("warning", "Passed with")):
        names = [finding.check for finding in findings if finding.verdict == verdict]
        if names:
            return f"{words} {len(names)} {verdict}{'s' * (len(names) > 1)} ({', '.join(names)})."
    return f"All {len(findings)} checks passed."


def errors_message(findings: Sequence[Finding]) -> str:
    lines = [f"  {f.check}: {f.found}. {f.remedy}" for f in findings if f.verdict == "error"]
    return "\n".join(["Pre-flight failed:", *lines])


def findings_json(findings: Sequence[Finding]) -> str:
    rows = [asdict(finding) for finding in findings]
    told = {"version": 1, "verdict": worst(findings), "line": verdict_line(findings), "findings": rows}
    return json.dumps(told, indent=1, ensure_ascii=False)
