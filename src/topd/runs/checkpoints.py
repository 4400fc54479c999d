"""Checkpoints on disk: which ones are whole, how a new one takes its place, and whose the output folder is.

A checkpoint is written into `unfinished/`, flushed to the disk and then renamed to `checkpoint-N`. So every
`checkpoint-N` is whole, unless something else wrote or damaged it; resuming compares the checksums in it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import xxhash
from safetensors import SafetensorError

from topd.errors import ResumeError, SavingError, TOPDError
from topd.runs.files import flush, write_json
from topd.runs.guard import REMEDIES

UNFINISHED = "unfinished"
"""Folder in which a checkpoint is written, in the output folder. Its name must not begin with `checkpoint-`."""

CHECKSUMS = "checksums.json"
"""In a checkpoint: {file: [bytes, XXH3-128]} of the files that resuming reads. It detects damage, not tampering."""
_NEVER_READ = (CHECKSUMS, "training_args.bin")

_PARTS = {
    "weights in safetensors": ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*"),
    "the optimizer's state": ("optimizer.pt", "optimizer_*"),
    "the scheduler's state": ("scheduler.pt",),
    "random states": ("rng_state*.pth",),
}
"""A checkpoint holds `trainer_state.json` and a file or folder of each row. DeepSpeed keeps the first three in
`global_step*`."""


def damage(checkpoint: Path, thorough: bool = False) -> str | None:
    """Why a run cannot resume from a checkpoint; None if the checkpoint is whole.

    Checks which files exist and their sizes. What is broken in a checkpoint without checksums, of another trainer, is
    found where it is loaded. `thorough`: also read every byte and compare checksums.
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
            cause = "; --save_only_model true saves none" if part != "weights in safetensors" else ""
            return f"there is no file with {part}{cause}"
    return changed_file(checkpoint, thorough)


def changed_file(checkpoint: Path, thorough: bool = False) -> str | None:
    """Which file of a checkpoint differs from its checksums; None if all agree, or it has none."""
    if not (checkpoint / CHECKSUMS).exists():
        return None
    try:
        for name, (length, digest) in json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")).items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            found = file.stat()
            if found.st_size != length or (thorough and _digest(file, length, found.st_mtime_ns) != digest):
                return f"{name} is damaged: it differs from {CHECKSUMS}"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS} or a file that it lists cannot be read"
    return None


@lru_cache(maxsize=4096)
def _digest(path: Path, length: int, changed: int) -> str:
    """Checksum of a file, cached by its length and modification time (ns)."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def checkpoints(run_folder: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, by step."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in run_folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def newest_whole(run_folder: Path, thorough: bool = False) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, or None; and a line about each later damaged one. `thorough`: see `damage`."""
    skipped: list[str] = []
    for path in reversed(checkpoints(run_folder)):
        found = damage(path, thorough)
        if found is None:
            return path, skipped
        skipped.append(f"{path} is not complete ({found})")
    return None, skipped


def checkpoint_to_resume(
    wanted: Literal[True] | str | os.PathLike[str], run_folder: Path, thorough: bool = True
) -> tuple[Path, list[str]]:
    """The checkpoint to resume from: the newest whole one (True) or a named one; and a line about each skipped one.

    `thorough`: see `damage`. Raises `ResumeError` if there is no whole checkpoint, or the named one is not whole.
    """
    if wanted is True:
        newest, skipped = newest_whole(run_folder, thorough)
        if newest is None:
            why = f": {'; '.join(skipped)}" if skipped else ""
            raise ResumeError(
                f"There is no checkpoint in {run_folder} to resume from{why}. Leave --resume_from_checkpoint out, or "
                "give auto."
            )
        return newest, skipped
    folder = Path(os.fspath(wanted))
    if not folder.is_dir():
        raise ResumeError(f"--resume_from_checkpoint {folder}: no such folder.")
    found = damage(folder, thorough)
    if found is not None:
        newest, _ = newest_whole(run_folder, thorough)
        other = f"--resume_from_checkpoint {newest} is complete." if newest else "There is no other complete one."
        raise ResumeError(f"{folder} is not a complete checkpoint: {found}. {other}")
    return folder, []


def put_in_place(written: Path, checkpoint: Path) -> None:
    """Add checksums, flush all files to the disk, then rename. A checkpoint of the same name is replaced."""
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
    """Turn the errors of a full or broken disk into one message that names the last complete checkpoint."""
    try:
        yield
    except TOPDError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise saving_error(what, run_folder, error) from error


def saving_error(what: str, run_folder: Path, error: BaseException) -> SavingError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    newest, _ = newest_whole(run_folder)
    kept, then = "There is no earlier checkpoint", "start again"
    if newest:
        kept = f"The last complete checkpoint is {newest}"
        then = "run the same command with --resume_from_checkpoint true; --save_total_limit 2 keeps the disk from "
        then += "filling up"
    remedy = REMEDIES.get(getattr(error, "errno", None) or 0, f"Free space on the disk of {run_folder}.")
    return SavingError(f"{what} could not be written ({reason}). {kept}. {remedy} Then {then}.")


AUTO = "auto"
"""Value of `resume_from_checkpoint`: resume from the newest complete checkpoint if there is one, else start."""


def check_writable(args: Any) -> None:
    """Create the output folder; raise `SavingError` if it cannot be written. Processes that save nothing skip this."""
    folder = Path(str(args.output_dir))
    if not args.should_save:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SavingError(
            f"Cannot write to {folder} ({error.strerror or error}). Use another --output_dir, or change "
            "its permissions."
        ) from error


def refuse_to_overwrite(folder: Path) -> None:
    """Raise `ResumeError` if the folder holds a trained model, which a new run would replace."""
    trained = [
        path for pattern in ("model*.safetensors", "adapter_model*.safetensors") for path in folder.glob(pattern)
    ]
    if trained and (folder / "trainer_state.json").is_file():
        raise ResumeError(
            f"{folder} contains the trained model of an earlier run ({trained[0].name}), which this run would replace. "
            "Use another --output_dir, or delete or move the model."
        )


def refuse_second_run(folder: Path) -> None:
    """Raise `ResumeError` if an earlier run left checkpoints: those of a new run would be mixed with them."""
    newest, _ = newest_whole(folder)
    if newest is not None:
        raise ResumeError(
            f"{folder} contains the checkpoints of an earlier run, up to {newest.name}. Resume with "
            "--resume_from_checkpoint true (in Python: trainer.train(resume_from_checkpoint=True)), or use another "
            "--output_dir, or delete them."
        )
