"""Tolerant reading of records: the missing is empty, the broken is counted in `notes`, the newer is refused."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from topd.errors import TOPDError
from topd.parsing import read_yaml
from topd.visible import visible as clean

RECORD_VERSION = 1
"""The newest version of the records that is understood here."""

LARGEST = 1e100
"""Far beyond float32, in which everything is measured. Sums, squares and axes of such numbers do not overflow."""

T = TypeVar("T")


class ReportError(TOPDError, ValueError):
    """The records of a run cannot be used."""


def read_object(path: Path, notes: list[str], newest: int = RECORD_VERSION) -> dict[str, Any]:
    """A JSON file's object; empty if there is none. Raises `ReportError` for a version after `newest`."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        check_version(value, path, newest)
        return value
    notes.append(f"{path.parent.name}/{path.name} is not a JSON object; it was left out.")
    return {}


def read_lines(path: Path, shown_as: str, notes: list[str], convert: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """The records of a JSON-lines file; broken lines are counted. Raises `ReportError` as `check_version` does."""
    if not path.is_file():
        return
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                check_version(record, path)
                yield convert(record)
            except ReportError:
                raise
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                broken += 1
    if broken:
        lines_were = "1 line was" if broken == 1 else f"{broken} lines were"
        notes.append(f"{lines_were} left out of {shown_as}: not a complete JSON record.")


def read_run_file(folder: Path, notes: list[str]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Options and provenance from a run's `run.yaml`; empty where there is none."""
    file = folder / "run.yaml"
    try:
        content = mapping(read_yaml(file.read_text(encoding="utf-8", errors="replace"))) if file.is_file() else {}
    except (OSError, ValueError):
        notes.append(f"{folder.name}/run.yaml cannot be read; it was left out.")
        content = {}
    return {name: value for name, value in content.items() if name != "provenance"}, mapping(content.get("provenance"))


def check_version(record: Mapping[str, Any], path: Path, newest: int = RECORD_VERSION) -> None:
    """Raise `ReportError` for what a version after `newest` wrote: it would be misread."""
    version = record.get("version", RECORD_VERSION)
    if version not in range(RECORD_VERSION, newest + 1):
        raise ReportError(
            f"{path} has record version {version!r}; this version of topd reads version {newest}. "
            "Install the version of topd that wrote it, or a newer one."
        )


def number(value: Any) -> float | None:
    """A number, or None where it is not finite or too large to be a measurement."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST else None  # NaN is not


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; empty if it is something else."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The JSON objects of a list; empty if it is something else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def strings(values: Any) -> tuple[str, ...]:
    return tuple(clean(value) for value in values or ())
