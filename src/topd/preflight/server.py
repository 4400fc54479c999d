"""The server that the teacher is on."""

from __future__ import annotations

from topd.preflight.finding import Finding, ok
from topd.preflight.setup import Setup
from topd.training.teacher_server import teacher_server, teacher_windows

NAME = "teacher's server"
PATIENCE = 10.0
"""Seconds for which it may fail: training waits longer, somebody at a terminal does not."""


def server(setup: Setup) -> Finding:
    """It is there, serves the teacher, cuts text as the student does, and answers in token ids.

    Raises:
        TOPDError: one of these is not so.
    """
    found = teacher_server(setup.config, has_weights=True, patience=PATIENCE)
    if found is None:
        return ok(NAME, f"method={setup.config.method} asks it for nothing")
    windows = teacher_windows(found, setup.config, setup.student.tokenizer, setup.student.end_tokens)
    context = f"a context of {windows.context:,}" if windows.context else "an unknown context"
    return ok(NAME, f"{found.url} serves {windows.model!r} with {context}, token ids in and out")
