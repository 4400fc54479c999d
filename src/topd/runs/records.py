"""Records written one by one, so that an interrupted analysis resumes where it stopped."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.runs.files import read_object, read_records, write_records

Records = list[dict[str, Any]]


def earlier_records(
    file: Path,
    options_file: Path,
    options: dict[str, Any],
    *,
    needs: Sequence[str] = (),
    keep: Callable[[Records], Records] = list,
    may_change: str = "rollouts",
) -> Records:
    """Records of an interrupted run with the same options; the file is cut to the records that are kept.

    A broken line loses only its own record. An interruption can cut the last line; any other broken line is reported,
    and the original file is kept as `FILE.damaged`.

    Args:
        options_file: the options of the records, which the caller writes.
        needs: keys that every record has.
        keep: selects the records to keep; the others are made again.
        may_change: an option that may differ, because it only sets the number of records.

    Raises `TOPDError` if the folder holds records with other options, or the options file is damaged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return []
    if options_file.exists():
        _refuse_other(file, options_file, options, may_change)
    records, broken = read_records(file, needs)
    kept, content = keep(records), file.read_bytes()
    lines = content.rstrip(b"\n").count(b"\n") + 1
    damaged = [number for number in broken if number < lines or content.endswith(b"\n")]
    if damaged:
        copy = file.with_name(file.name + ".damaged")
        shutil.copyfile(file, copy)
        print(
            f"topd: {file}: line {', '.join(map(str, damaged[:5]))}{' ...' if len(damaged) > 5 else ''} is broken; "
            f"{len(kept)} records are kept, the others are made again. The original file: {copy}",
            file=sys.stderr,
        )
    if broken or len(kept) != len(records) or (content and not content.endswith(b"\n")):
        write_records(kept, file)
    return kept


def _refuse_other(file: Path, options_file: Path, options: dict[str, Any], may_change: str) -> None:
    before = read_object(
        options_file,
        f"It contains the settings of {file.name}. If they are the same as now, delete {options_file}; else give "
        "another --out.",
    )
    now = json.loads(json.dumps(options))
    other = sorted(name for name in now if name != may_change and before.get(name) != now[name])
    if other:
        raise TOPDError(
            f"{file.parent} contains records with other settings ({', '.join(other)}). Give another --out, or delete "
            f"{file}."
        )


AUDIT_FILE = "audit.jsonl"
"""Audit records of a training run, in its folder."""
EVAL_FILE = "eval_responses.jsonl"
"""A few responses of each evaluation during training, in the run's folder."""


def cut_records(path: Path, step: int) -> None:
    """Keep the records up to the optimizer step at which a run resumes: later ones are made again.

    At step 0 all records belong to an earlier run and move to a file such as `audit.earlier.jsonl`.
    """
    if not path.is_file():
        return
    if step == 0:
        path.replace(path.with_suffix(".earlier.jsonl"))
    else:
        write_records([record for record in read_records(path, ["step"])[0] if record["step"] <= step], path)
