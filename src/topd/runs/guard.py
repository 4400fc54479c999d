"""Around every command: whatever nothing else has put in words ends in a message, its traceback in a file."""

from __future__ import annotations

import errno
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topd.errors import SavingError, TOPDError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REPORT_NEEDS = ("jinja2", "markupsafe", "matplotlib")
_REMEDIES = {
    errno.EROFS: "It cannot be written. Name another one.",
    errno.EACCES: "Check its permissions, or name another one.",
    errno.EPERM: "Check its permissions, or name another one.",
    errno.EEXIST: "A file is in the way of a folder. Name another one.",
    errno.ENOTDIR: "A file is in the way of a folder. Name another one.",
    errno.EISDIR: "A folder is in the way of a file. Name another one.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
"""What to do about an error of the system that names a file."""


@contextmanager
def guarded(folder: Path | None) -> Iterator[None]:
    """Turn everything unforeseen into a `TOPDError`.

    Args:
        folder: where the command writes, and so its traceback; None: there is none yet.
    """
    try:
        yield
    except TOPDError:
        raise
    except Exception as error:
        raise in_words(error, folder) from error


def in_words(error: Exception, folder: Path | None) -> TOPDError:
    """What an error means to the user."""
    if isinstance(error, ImportError) and error.name in REPORT_NEEDS:
        return TOPDError(f"this needs {error.name}: pip install 'topd[report]'.")
    reason = " ".join(str(error).split())[:400]
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return SavingError(
            f"The disk is full ({reason}). What was written so far is whole. Free space, then run the same command "
            "again to go on."
        )
    if isinstance(error, OSError) and error.errno in _REMEDIES and error.filename is not None:
        return TOPDError(f"{error.filename}: {error.strerror}. {_REMEDIES[error.errno]}")
    kept = _kept_traceback(folder)
    if type(error).__module__.partition(".")[0] == "jinja2" and not _is_of_the_report(error):
        return TOPDError(
            f"The chat template refuses a prompt, or is broken ({type(error).__name__}: {reason}). Change the prompts "
            f"or the options that it takes, or repair the template.{kept}"
        )
    return TOPDError(
        f"Stopped by {type(error).__name__}: {reason} If this names an option, correct it; otherwise it may be a bug."
        f"{kept}"
    )


def _is_of_the_report(error: Exception) -> bool:
    """Whether the template is our own page."""
    return any(Path(frame.filename).parent.name == "report" for frame in traceback.extract_tb(error.__traceback__))


def _kept_traceback(folder: Path | None) -> str:
    """Write the traceback, and say where it is: in the folder, or where that cannot be, among temporary files."""
    for place in (folder, Path(tempfile.gettempdir()) / "topd"):
        if place is not None:
            try:
                place.mkdir(parents=True, exist_ok=True)
                (place / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
            except OSError:
                continue
            return f" {place / 'traceback.txt'} says where it happened."
    return ""
