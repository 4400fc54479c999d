"""What is printed may find no reader any more, as in `topd train | head`. A run must not end by that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

CLOSED = 128 + 13
"""Exit status of a program that SIGPIPE ends."""


@contextmanager
def output_may_close(goes_on: bool) -> Iterator[None]:
    """While the block runs, a closed standard output or error is no error.

    Args:
        goes_on: whether the command continues without it (as training does), or ends quietly, with exit status 141.
    """
    before = sys.stdout, sys.stderr
    streams = [_Stream(stream, goes_on) for stream in before]
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield
        for stream in streams:
            stream.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Stream:
    """A text stream that outlives its reader, and shows characters that it cannot encode as escapes."""

    def __init__(self, stream: Any, goes_on: bool) -> None:
        self._stream, self._goes_on = stream, goes_on

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
        """From now on nothing is printed: the descriptor leads nowhere, also when Python flushes it at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not self._goes_on:
            raise SystemExit(CLOSED)
        if self is sys.stdout:
            print("topd: the output is closed (a pipe, such as `| head`); the run goes on without it.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
