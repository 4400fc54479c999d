"""The output folder of a run before anything is loaded: it can be written, and belongs to no earlier run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from topd.errors import ResumeError, SavingError
from topd.runs.checkpoints import newest_whole

AUTO = "auto"
"""Value of `resume_from_checkpoint`: go on from the newest whole checkpoint, or start from scratch without one."""


def check_writable(args: Any) -> None:
    """Make the output folder. Raise `SavingError` where nothing can be written into it.

    Args:
        args: the options of a run; of several processes those that save look.
    """
    folder = Path(str(args.output_dir))
    if not args.should_save:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SavingError(
            f"Nothing can be written into {folder} ({error.strerror or error}). Name another --output_dir, or change "
            "its permissions."
        ) from error


def refuse_second_run(folder: Path) -> None:
    """Raise `ResumeError` where an earlier run has left checkpoints: those of a new one would be mixed with them."""
    newest, _ = newest_whole(folder)
    if newest is not None:
        raise ResumeError(
            f"{folder} holds the checkpoints of an earlier run, up to {newest.name}. Go on with "
            "--resume_from_checkpoint true (in Python: trainer.train(resume_from_checkpoint=True)), or name another "
            "--output_dir, or delete them."
        )
