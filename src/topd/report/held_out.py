"""Responses to held-out problems that training kept: those of the newest evaluation, as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topd.report.elements import plural
from topd.report.reading import clean, read_lines

LONGEST = 600
"""Characters shown of a problem, and of a response."""

Row = tuple[str, str, str, str]
"""Problem, response, wanted answer, verdict."""


def load_responses(file: Path, arm: str, notes: list[str]) -> tuple[str, list[Row]]:
    """The title of the newest evaluation's table, and its rows in the order of the problems."""
    newest = 0
    rows: dict[str, Row] = {}
    for step, problem, row in read_lines(file, f"{arm}/{file.name}", notes, _response):
        if step > newest:
            newest = step
            rows.clear()
        rows[problem] = row  # an evaluation can be repeated at a step
    return f"{plural(len(rows), 'response')} to held-out problems, step {newest}", list(rows.values())


def _response(record: Mapping[str, Any]) -> tuple[int, str, Row]:
    """The step, the problem in full, and the row."""
    problem, response, answer = (clean(record[name]) for name in ("problem", "response", "answer"))
    verdict = ("right" if record["right"] else "wrong") + ("" if record.get("ended", True) else ", truncated")
    return int(record["step"]), problem, (_shown(problem), _shown(response), answer, verdict)


def _shown(text: str) -> str:
    """A long text's beginning and its end, where the answer is."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
