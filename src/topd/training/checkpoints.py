"""Checkpoints on disk: which ones are whole, and how a new one takes its place.

A checkpoint is written into `unfinished/`, flushed to the disk and then renamed to `checkpoint-N`. So whatever is
called `checkpoint-N` is whole, unless something else wrote or damaged it; that is looked for when a run resumes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from topd.errors import ResumeError, SavingError

UNFINISHED = "unfinished"
"""Folder in the output folder in which a checkpoint is written; its name must not begin like a checkpoint's."""

_PARTS = {
    "weights in safetensors": ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*"),
    "the optimizer's state": ("optimizer.pt", "optimizer_*"),
    "random states": ("rng_state*.pth",),
}
"""What a checkpoint holds besides `trainer_state.json`: one file or folder of each row. DeepSpeed keeps the first two
in `global_step*`."""


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from resuming here; None if the checkpoint is whole.

    Looks at what is there, at the headers of the weights (which give the length that the file must have), and at the
    ends of the other files. It does not read the numbers.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
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
    return None


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


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, or None; and a line about each later one that is damaged."""
    passed_over: list[str] = []
    for path in reversed(checkpoints(run_folder)):
        if _step(path) < 0 or not path.is_dir():
            continue
        found = damage(path)
        if found is None:
            return path, passed_over
        passed_over.append(f"{path} is not whole ({found})")
    return None, passed_over


def checkpoint_to_resume(wanted: Literal[True] | str | os.PathLike[str], run_folder: Path) -> tuple[Path, list[str]]:
    """Where to resume: the newest whole checkpoint (True) or the one named; and a line about each one passed over.

    Raises:
        ResumeError: there is none, or the one named is not whole.
    """
    newest, passed_over = newest_whole(run_folder)
    if wanted is True:
        if newest is None:
            lines = [f"There is no checkpoint in {run_folder} to resume from{'' if not passed_over else ':'}"]
            raise ResumeError("; ".join([*lines, *passed_over]) + ". Leave --resume_from_checkpoint out, or give auto.")
        return newest, passed_over
    folder = Path(os.fspath(wanted))
    if not folder.is_dir():
        raise ResumeError(f"--resume_from_checkpoint {folder}: there is no such folder.")
    found = damage(folder)
    if found is not None:
        other = f"--resume_from_checkpoint {newest} is whole." if newest else "There is no whole one in its place."
        raise ResumeError(f"{folder} is not a whole checkpoint: {found}. {other}")
    return folder, []


def put_in_place(written: Path, checkpoint: Path) -> None:
    """Flush what was written to the disk, then give it its name at once. An older one of that name goes."""
    for path in written.rglob("*"):
        if path.is_file():
            _flush(path)
    old = written.with_name(f"replaced-{checkpoint.name}")
    if checkpoint.exists():
        checkpoint.rename(old)
    written.rename(checkpoint)
    _flush(checkpoint.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saving(what: str, run_folder: Path) -> Iterator[None]:
    """Turn the many errors of a full or broken disk into one message that names the last whole checkpoint."""
    try:
        yield
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
