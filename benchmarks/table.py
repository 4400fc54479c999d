"""The table that a run prints, and the same as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.row import Row

VERDICT = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: ""}


def print_table(rows: Iterable[Row]) -> None:
    rows = list(rows)
    table = Table(title="ours / baseline: medians of interleaved repeats, [quartiles]", title_justify="left")
    for name in ("case", "size", "measure", "baseline"):
        table.add_column(name, overflow="fold")
    for name in ("ours", "baseline's", "ratio", "gate"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    last = None
    for row in rows:
        if last is not None and row.case != last:
            table.add_section()
        last = row.case
        table.add_row(row.case, row.size, row.measure, row.beside, *_numbers(row))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for row in rows:
        if row.error or row.note:
            colour = "red" if row.error else "dim"
            about = " / ".join(word for word in (row.case, row.size, row.beside) if word)
            console.print(f"{about}: {row.error or row.note}", style=colour, markup=False, highlight=False)


def markdown(records: list[dict[str, Any]]) -> str:
    """The rows of a JSON file as one Markdown table, failures and notes below it."""
    rows = [Row(**{field.name: record[field.name] for field in fields(Row)}) for record in records]
    lines = [
        "| case | size | measure | baseline | ours | baseline's | ratio | gate | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    words = {True: "pass", False: "**fail**", None: ""}
    for row in rows:
        ours, other, ratio, gate, _ = _numbers(row)
        cells = (
            row.case,
            row.size,
            row.measure,
            row.beside,
            ours,
            other,
            ratio.replace("\\[", "["),
            gate,
            words[row.ok],
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] + [
        f"- {row.case}, {row.size}, {row.beside}: {row.error or row.note}" for row in rows if row.error or row.note
    ]
    return "\n".join(lines)


def _numbers(row: Row) -> tuple[str, str, str, str, str]:
    ours, other = _sides(row)
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    if row.spread is not None:
        ratio += rf" \[{row.spread[0]:.2f}, {row.spread[1]:.2f}]"
    return ours, other, ratio, "" if row.gate is None else f"{row.gate:g}", VERDICT[row.ok]


def _sides(row: Row) -> tuple[str, str]:
    if row.seconds is not None:
        return _time(row.seconds["ours"]), _time(row.seconds["beside"])
    if row.bytes is not None:
        return f"{row.bytes['ours'] / 1e6:.0f} MB", f"{row.bytes['beside'] / 1e6:.0f} MB"
    if row.errors is not None:
        return f"{row.errors['ours']:.2e}", f"{row.errors['beside']:.2e}"
    return "", ""


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
