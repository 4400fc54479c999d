"""Findings as a table, as one line, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from topd.check.finding import Finding, worst
from topd.visible import visible

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    table = Table(
        "check", "verdict", "found", "what to do", title=escape(visible(title)), title_justify="left", show_lines=True
    )
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        table.add_row(
            finding.check,
            f"[{colour}]{finding.verdict}[/{colour}]",
            escape(visible(finding.found)),
            escape(visible(finding.remedy)),
        )
    return table


def verdict_line(findings: Sequence[Finding]) -> str:
    """The whole in one line."""
    named = {
        verdict: [finding.check for finding in findings if finding.verdict == verdict]
        for verdict in ("error", "warning")
    }
    if named["error"]:
        return f"Not ready: {_counted(named['error'], 'error')}."
    if named["warning"]:
        return f"Ready, with {_counted(named['warning'], 'warning')}."
    return f"Ready: {len(findings)} checks, nothing found."


def _counted(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' * (len(names) > 1)} ({', '.join(names)})"


def findings_json(findings: Sequence[Finding]) -> str:
    return json.dumps(
        {
            "version": 1,
            "verdict": worst(findings),
            "line": verdict_line(findings),
            "findings": [asdict(finding) for finding in findings],
        },
        indent=1,
        ensure_ascii=False,
    )
