"""Records that are written one by one, so that a long analysis goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topd.errors import TOPDError


def earlier_records(
    file: Path, options_file: Path, options: dict[str, Any], *, limit: int, batch: int = 1, may_change: str = "rollouts"
) -> list[dict[str, Any]]:
    """Records of an interrupted run with the same options, whole batches only; the file is cut to them.

    Args:
        limit: how many are wanted; `batch`: how many are written together.
        may_change: the option that may differ, because it only says how many there are to be.

    Raises:
        TOPDError: the folder holds records of something else.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return []
    if options_file.exists():
        before, now = json.loads(options_file.read_text(encoding="utf-8")), json.loads(json.dumps(options))
        other = sorted(name for name in now if name != may_change and before.get(name) != now[name])
        if other:
            raise TOPDError(
                f"{file.parent} holds records with other settings ({', '.join(other)}). Give another --out, or delete "
                f"{file}."
            )
    lines = lines_of(file)
    records = list(_whole(lines))
    kept = records[:limit] if len(records) >= limit else records[: len(records) // batch * batch]
    if len(kept) != len(lines) or (lines and not file.read_bytes().endswith(b"\n")):
        aside = file.with_name(file.name + ".part")
        aside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
        os.replace(aside, file)
    return kept


def lines_of(file: Path) -> list[str]:
    """The lines of a file, none if it is missing. The last may be cut, in the middle of a character too.

    Only "\\n" ends a line: other characters that do so for Python, such as U+2028, may stand in a record.
    """
    text = file.read_bytes().decode("utf-8", errors="replace") if file.exists() else ""
    return [line for line in text.split("\n") if line]


def write_options(file: Path, options: dict[str, Any]) -> None:
    """For the next `earlier_records`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Records up to the first broken line: an interruption can cut the last one."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
