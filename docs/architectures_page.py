"""Fills the table of docs/architectures.md from the sweep's record: python docs/architectures_page.py"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("architectures.md")
RECORD = Path(__file__).with_name("architectures.json")
PLACE = re.compile(r"(<!-- table: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = """\
Not recorded for this version yet: run `python tests/sweep.py docs/architectures.json` on a core of its own, then
`python docs/architectures_page.py`.
"""
WAYS = {
    "shared": "exact (all fast paths)",
    "partly shared": "exact (some fast paths)",
    "plain": "exact (slow path)",
    "refused": "refused",
    "not built": "not built",
    "wrong": "wrong",
}


def architectures_page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table as the record says."""
    if not rows:
        return PLACE.sub(lambda place: place[1] + NOTHING + place[2], text)
    classes = [row for row in rows if "," not in row["class"]]
    lines = [
        counted("classes", classes),
        counted("variants of their configs", [row for row in rows if row not in classes]),
        "",
        "| class, variant | runs on | slow path for, or reason | TRL's forward pass is exact | tested |",
        "|---|---|---|---|---|",
        *(" | ".join(["", *cells_of(row), ""]).strip() for row in rows),
    ]
    return PLACE.sub(lambda place: place[1] + "\n".join(lines) + "\n" + place[2], text)


def counted(what: str, rows: list[dict[str, Any]]) -> str:
    counts = Counter(row["way"] for row in rows)
    found = f"{len(rows)} {what} recorded: " + ", ".join(f"{counts[way]} {words}" for way, words in WAYS.items()) + "."
    return textwrap.fill(found, 120)


def cells_of(row: dict[str, Any]) -> list[str]:
    why = row["why"].replace("|", "\\|")
    return [named(row["class"]), WAYS[row["way"]], why, row.get("trl", ""), row["examined"]]


def named(subject: str) -> str:
    """The class as code, its variant as text."""
    name, comma, variant = subject.partition(",")
    return f"`{name}`{comma}{variant}"


def read_record() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(architectures_page(page, read_record()), encoding="utf-8")
