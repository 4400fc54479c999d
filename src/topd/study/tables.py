"""A study's tables: each arm compared with OPD, or with any other arm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from topd.errors import TOPDError
from topd.evaluation.tables import open_table
from topd.runs.files import read_json
from topd.study.config import REFERENCE
from topd.study.summary import answers, difference_key, summarise
from topd.version import STUDY_VERSION

WAYS = ("greedy", "sampled")


def read_study(file: Path) -> dict[str, Any]:
    """Read a `study.json`. Raises `TOPDError` if it cannot be read or has another format."""
    result = read_json(file, "Name a study.json that `topd study` wrote.")
    if not isinstance(result, dict) or result.get("version") != STUDY_VERSION or "arms" not in result:
        raise TOPDError(
            f"{file} is no study.json of version {STUDY_VERSION}. Run the study again: finished runs are reused."
        )
    return result


def print_tables(result: dict[str, Any], against: str = REFERENCE) -> None:
    """Print both tables, greedy and sampled. Raises `TOPDError` if there is no such arm."""
    if against not in result["arms"]:
        raise TOPDError(f"There is no arm {against!r} in this study; there are: {', '.join(result['arms'])}.")
    for how in WAYS:
        console = Console()
        Console(width=max(112, console.width)).print(study_table(result, how, against))


def study_table(result: Mapping[str, Any], how: str, against: str = REFERENCE) -> Table:
    """The table for a terminal."""
    problems = result["plan"]["held_out"]
    title = f"{how}, {problems} held-out problems, 95 % intervals over seeds and problems"
    columns = ("", "accuracy", f"minus {against}, points", "p (Holm)", "ahead", "s")
    table = open_table(columns, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for row in study_rows(result, how, against):
        table.add_row(*row)
    return table


def study_rows(result: Mapping[str, Any], how: str, against: str = REFERENCE) -> list[list[str]]:
    """One row per arm: name, accuracy and difference with intervals, adjusted p, seeds ahead, seconds."""
    if against == REFERENCE:
        found = {name: arm[how] for name, arm in result["arms"].items()}
    else:
        found = summarise(answers(result, how), against)
    rows = []
    for name, arm in found.items():
        accuracy, difference = arm["accuracy"], arm.get(difference_key(against))
        seconds = list(result["arms"][name]["seconds_training"].values())
        rows.append(
            [
                name,
                f"{accuracy['mean']:.1%} ({_range(accuracy)})",
                f"{100 * difference['mean']:+.1f} ({_range(difference, '+')})" if difference else "",
                f"{difference['p_holm']:.2g}" if difference else "",
                f"{difference['ahead']}/{len(difference['seeds'])}" if difference else f"{len(arm['seeds'])} seeds",
                f"{sum(seconds) / len(seconds):.0f}",
            ]
        )
    return rows


def _range(value: Mapping[str, float], sign: str = "") -> str:
    """An interval in percentage points; where all answers are alike there is none, since their spread is not known."""
    if value["low"] == value["high"]:
        return "all alike"
    return f"{100 * value['low']:{sign}.1f} to {100 * value['high']:{sign}.1f}"
