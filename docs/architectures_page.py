"""Fills the table of docs/architectures.md from the sweep's record: python docs/architectures_page.py"""

from __future__ import annotations

import json
import re
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
    "shared": "exact and shared",
    "partly shared": "exact, partly by the plain way",
    "plain": "exact by the plain way",
    "refused": "refused",
}


def architectures_page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table as the record says."""
    if not rows:
        return PLACE.sub(lambda place: place[1] + NOTHING + place[2], text)
    counts = Counter(row["way"] for row in rows)
    lines = [
        f"{len(rows)} classes recorded: " + ", ".join(f"{counts[way]} {words}" for way, words in WAYS.items()) + ".",
        "",
        "| class | way | not shared, or reason | examined |",
        "|---|---|---|---|",
        *(f"| `{row['class']}` | {WAYS[row['way']]} | {row['why']} | {row['examined']} |" for row in rows),
    ]
    return PLACE.sub(lambda place: place[1] + "\n".join(lines) + "\n" + place[2], text)


def read_record() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(architectures_page(page, read_record()), encoding="utf-8")
