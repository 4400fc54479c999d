"""Files of a run: they appear whole or not at all, and broken ones end in a message instead of a traceback."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topd.errors import TOPDError

PART = ".part"
"""Suffix of a file that is being written."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to. When the block ends, it is flushed to the disk and renamed to `file`.

    Readers find the old file or the new one, never half of it, also after a crash. If the block raises, the old file
    stays and nothing else is left. Links are followed; a device such as /dev/stdout is written directly.
    """
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.is_file():
        yield file
        return
    aside = file.with_name(f"{file.name}.{os.getpid()}{PART}")
    try:
        yield aside
        flush(aside)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def flush(file: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(text: str, file: Path) -> None:
    """Replace a file's text. Half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    with replacing(file) as aside:
        aside.write_bytes(text.encode("utf-8", "replace"))


def write_json(value: Any, file: Path, indent: int | None = 1) -> None:
    with replacing(file) as aside:
        aside.write_bytes(as_json(value, indent))


def write_records(records: Iterable[dict[str, Any]], file: Path) -> None:
    with replacing(file) as aside:
        aside.write_bytes(b"".join(map(as_json, records)))


def append_records(records: Iterable[dict[str, Any]], file: Path) -> None:
    """Append to a JSON-lines file, creating it and its folder. A crash can cut the last line; see `read_records`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as lines:
        lines.write(b"".join(map(as_json, records)))


def as_json(value: Any, indent: int | None = None) -> bytes:
    """A line of JSON. Half a surrogate pair stays escaped, as JSON allows: UTF-8 cannot hold it."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_json(file: Path, remedy: str) -> Any:
    """The value in a JSON file. Raises `TOPDError` with the remedy, a sentence, if it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TOPDError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}). {remedy}") from error


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """`read_json` for a file that must hold a JSON object."""
    value = read_json(file, remedy)
    if not isinstance(value, dict):
        raise TOPDError(f"{file} is damaged: it contains no JSON object. {remedy}")
    return value


def read_records(file: Path, needs: Iterable[str] = ()) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a JSON-lines file, and the numbers (from 1) of its broken lines. Both are empty if it is missing.

    Only "\\n" ends a line: a record may contain other characters that Python treats as line ends, such as U+2028.
    `needs`: keys that every record has.
    """
    records: list[dict[str, Any]] = []
    broken: list[int] = []
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and record.keys() >= set(needs):
                records.append(record)
            else:
                broken.append(number)
    return records, broken
