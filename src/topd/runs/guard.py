"""Around every command: a closed output is no error, and an unforeseen error ends in a message."""

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from topd.errors import SavingError, TOPDError, install

TRACEBACK = "traceback.txt"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REPORT_NEEDS = ("jinja2", "markupsafe", "matplotlib")
REMEDIES = {
    errno.EROFS: "It is read-only. Use another path.",
    errno.EACCES: "Check its permissions, or use another path.",
    errno.EPERM: "Check its permissions, or use another path.",
    errno.EEXIST: "A file exists where a folder is needed. Use another path.",
    errno.ENOTDIR: "A file exists where a folder is needed. Use another path.",
    errno.EISDIR: "A folder exists where a file is needed. Use another path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
"""Remedies for system errors that name a file."""


@contextmanager
def guarded(folder: Path | None, remove: bool = False) -> Iterator[None]:
    """Turn every unforeseen error into a `TOPDError`, and write its traceback to a file in the command's folder.

    `remove`: where nothing goes wrong, remove the traceback that an earlier command left there.
    """
    try:
        yield
        if remove and folder is not None:
            (folder / TRACEBACK).unlink(missing_ok=True)
    except TOPDError:
        raise
    except Exception as error:
        raise as_topd_error(error, folder) from error


def as_topd_error(error: Exception, folder: Path | None) -> TOPDError:
    if isinstance(error, ImportError) and error.name in REPORT_NEEDS:
        return TOPDError(f"this needs {error.name}: {install('report')}.")
    reason = " ".join(str(error).split())[:400]
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return SavingError(
            f"The disk is full ({reason}). Files written so far are complete. Free space, then run the same command "
            "again to resume."
        )
    if isinstance(error, OSError) and error.errno in REMEDIES and error.filename is not None:
        return TOPDError(f"{error.filename}: {error.strerror}. {REMEDIES[error.errno]}")
    where = _write_traceback(folder)
    folders = [Path(frame.filename).parent.name for frame in traceback.extract_tb(error.__traceback__)]
    if type(error).__module__.partition(".")[0] == "jinja2" and "report" not in folders:
        return TOPDError(
            f"The chat template rejects a prompt, or is broken ({type(error).__name__}: {reason}). Change the prompts "
            f"or the template's options, or fix the template.{where}"
        )
    return TOPDError(
        f"Stopped by {type(error).__name__}: {reason} If this names an option, correct it; otherwise it may be a bug."
        f"{where}"
    )


def _write_traceback(folder: Path | None) -> str:
    """Write the traceback to the folder, or else to the temporary folder; return a sentence that names the file."""
    for place in (folder, Path(tempfile.gettempdir()) / "topd"):
        if place is not None:
            try:
                place.mkdir(parents=True, exist_ok=True)
                (place / TRACEBACK).write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
            except OSError:
                continue
            return f" The traceback is in {place / TRACEBACK}."
    return ""


@contextmanager
def output_may_close(continues: bool) -> Iterator[None]:
    """While the block runs, a closed standard output or error is no error, as in `topd train | head`.

    `continues`: whether the command continues without output (as training does) or exits with status 141.
    """
    before = sys.stdout, sys.stderr
    streams = [_Stream(stream, continues) for stream in before]
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield
        for stream in streams:
            stream.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Stream:
    """A text stream that tolerates a closed reader, and writes characters that it cannot encode as escapes."""

    def __init__(self, stream: Any, continues: bool) -> None:
        self._stream, self._continues = stream, continues

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError:
            self._closed()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._closed()

    def _closed(self) -> None:
        """Redirect the descriptor to the null device, so that nothing more is printed, not even by the final flush."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not self._continues:
            raise SystemExit(128 + 13)  # as of a program that SIGPIPE ended
        if self is sys.stdout:
            print("topd: the output is closed (a pipe, as `| head`); the run continues without it.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
