"""One process at a time writes into a folder: two would count records twice and replace each other's checkpoints."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from topd.errors import TOPDError

LOCK = "_in_use.lock"
"""Uploads to the Hub leave out what begins with an underscore."""
_held: set[Path] = set()


@contextmanager
def sole_writer(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Lock a folder while the block runs. The system releases the lock when the process ends, for whatever reason.

    A process may lock the same folder more than once. `name`: of the lock file; commands that write different files
    into one folder use different locks. Raises `TOPDError` if another process holds the lock.
    """
    from filelock import FileLock, Timeout  # slow to import

    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.resolve() / name
    if file in _held:
        yield
        return
    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise TOPDError(
            f"{folder} is in use by another command{_owner(file)}. Wait until it ends, or use another output "
            f"folder. (If there is no such process, delete {file}.)"
        ) from None
    _held.add(file)
    try:
        if not file.stat().st_size:  # else it is the lock's own note, where the file system has no locks
            file.write_text(f"{os.getpid()}\n{platform.node()}\n")
        yield
    finally:
        _held.discard(file)
        with suppress(OSError):
            file.unlink(missing_ok=True)  # before the release: afterwards it may be another process's
            if new:
                folder.rmdir()  # where nothing was written
        lock.release()


def _owner(file: Path) -> str:
    try:
        process, machine = file.read_text().split("\n")[:2]
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {machine})"
