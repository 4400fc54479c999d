"""Checkpoints on disk: which ones are whole, and how a new one takes its place.

A checkpoint is written into `unfinished/`, flushed to the disk and then renamed to `checkpoint-N`. So whatever is
called `checkpoint-N` is whole, unless something else wrote or damaged it; that is looked for when a run resumes, by the
checksums in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import xxhash
from safetensors import SafetensorError, safe_open

from topd.errors import ResumeError, SavingError, TOPDError
from topd.runs.files import flush, write_json

UNFINISHED = "unfinished"
"""Folder in the output folder in which a checkpoint is written; its name must not begin like a checkpoint's."""

CHECKSUMS = "checksums.json"
"""In a checkpoint: {file: [bytes, XXH3-128]} of what resuming reads. Not a signature: it finds damage, no attacker."""
_NEVER_READ = (CHECKSUMS, "training_args.bin")

_PARTS = {
    "weights in safetensors": ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*"),
    "the optimizer's state": ("optimizer.pt", "optimizer_*"),
    "the scheduler's state": ("scheduler.pt",),
    "random states": ("rng_state*.pth",),
}
"""What a checkpoint holds besides `trainer_state.json`: one file or folder of each row. DeepSpeed keeps the first three
in `global_step*`."""


def damage(checkpoint: Path, thorough: bool = False) -> str | None:
    """What keeps a run from resuming here; None if the checkpoint is whole.

    Looks at what is there, at the headers of the weights (which give the length that the file must have), and at the
    ends of the other files.

    Args:
        thorough: read every byte, too, and compare with the checksums; where there are none (a checkpoint of an earlier
            version, or of another trainer), with those that .pt files have inside. Weights have none.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "trainer_state.json is missing or broken"
    sharded_by_deepspeed = any(checkpoint.glob("global_step*"))
    for part, patterns in _PARTS.items():
        if sharded_by_deepspeed and part != "random states":
            continue
        if not any(path for pattern in patterns for path in checkpoint.glob(pattern)):
            return f"there is no file with {part}"
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{path.name} is cut off or broken"
    missing = [name for name in _shards(checkpoint) if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off or broken"
    return _changed(checkpoint) if thorough else None


def _changed(checkpoint: Path) -> str | None:
    """The first file that is not as it was saved, by its checksum."""
    if not (checkpoint / CHECKSUMS).exists():
        for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
            try:
                with zipfile.ZipFile(path) as parts:
                    broken = parts.testzip()
            except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
                broken = "unreadable"
            if broken is not None:
                return f"{path.name} is damaged"
        return None
    try:
        wanted = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        for name, (length, digest) in wanted.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            found = (checkpoint / name).stat()
            if found.st_size != length or _digest(checkpoint / name, found.st_size, found.st_mtime_ns) != digest:
                return f"{name} is damaged: its checksum in {CHECKSUMS} is another"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS} or a file that it names cannot be read"
    return None


@lru_cache(maxsize=4096)
def _digest(path: Path, length: int, changed: int) -> str:
    """Of a file's bytes; read again only when its length or the time of its last change (ns) is another."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _shards(checkpoint: Path) -> set[str]:
    """Files that the index of sharded weights names."""
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {f"a readable {index.name}"}


def _step(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(run_folder: Path) -> list[Path]:
    """All of a run, whole or not, by step."""
    return sorted(run_folder.glob("checkpoint-*"), key=_step)


def newest_whole(run_folder: Path, thorough: bool = False) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, or None; and a line about each later one that is damaged. `thorough`: see `damage`."""
    passed_over: list[str] = []
    for path in reversed(checkpoints(run_folder)):
        if _step(path) < 0 or not path.is_dir():
            continue
        found = damage(path, thorough)
        if found is None:
            return path, passed_over
        passed_over.append(f"{path} is not whole ({found})")
    return None, passed_over


def checkpoint_to_resume(
    wanted: Literal[True] | str | os.PathLike[str], run_folder: Path, thorough: bool = True
) -> tuple[Path, list[str]]:
    """Where to resume: the newest whole checkpoint (True) or the one named; and a line about each one passed over.

    Args:
        thorough: see `damage`.

    Raises:
        ResumeError: there is none, or the one named is not whole.
    """
    if wanted is True:
        newest, passed_over = newest_whole(run_folder, thorough)
        if newest is None:
            lines = [f"There is no checkpoint in {run_folder} to resume from{'' if not passed_over else ':'}"]
            raise ResumeError("; ".join([*lines, *passed_over]) + ". Leave --resume_from_checkpoint out, or give auto.")
        return newest, passed_over
    folder = Path(os.fspath(wanted))
    if not folder.is_dir():
        raise ResumeError(f"--resume_from_checkpoint {folder}: there is no such folder.")
    found = damage(folder, thorough)
    if found is not None:
        newest, _ = newest_whole(run_folder, thorough)
        other = f"--resume_from_checkpoint {newest} is whole." if newest else "There is no whole one in its place."
        raise ResumeError(f"{folder} is not a whole checkpoint: {found}. {other}")
    return folder, []


def put_in_place(written: Path, checkpoint: Path) -> None:
    """Add checksums, flush all to the disk, then give it its name at once. An older one of that name goes."""
    sums: dict[str, Any] = {}
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        flush(path)
        name, found = path.relative_to(written).as_posix(), path.stat()
        if name not in _NEVER_READ:
            sums[name] = found.st_size, _digest(path, found.st_size, found.st_mtime_ns)
    write_json(sums, written / CHECKSUMS)
    old = written.with_name(f"replaced-{checkpoint.name}")
    if checkpoint.exists():
        checkpoint.rename(old)
    written.rename(checkpoint)
    flush(checkpoint.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


@contextmanager
def saving(what: str, run_folder: Path) -> Iterator[None]:
    """Turn the many errors of a full or broken disk into one message that names the last whole checkpoint."""
    try:
        yield
    except TOPDError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise saving_error(what, run_folder, error) from error


def saving_error(what: str, run_folder: Path, error: BaseException) -> SavingError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    newest, _ = newest_whole(run_folder)
    return SavingError(
        f"{what} could not be written ({reason}). "
        + (f"The last whole checkpoint is {newest}. " if newest else "There is no earlier checkpoint. ")
        + f"Free space on the disk of {run_folder}"
        + (
            ", then go on with the same command and --resume_from_checkpoint true; --save_total_limit 2 keeps the disk "
            "from filling up."
            if newest
            else ", then start again."
        )
    )
