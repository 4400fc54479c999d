"""The server that the teacher is on."""

from __future__ import annotations

from topd.check.finding import Finding, ok
from topd.check.setup import Setup
from topd.teachers.from_options import check_without_weights, teacher_server, teacher_windows

NAME = "teacher's server"
PATIENCE = 10.0
"""Seconds for which it may fail: training waits longer, somebody at a terminal does not."""


def server(setup: Setup) -> Finding:
    """It is there, serves the teacher, cuts text as the student does, and answers in token ids; it may be alone.

    Raises:
        TOPDError: one of these is not so.
    """
    if not setup.teacher_here:
        check_without_weights(setup.config)
    found = teacher_server(setup.config, setup.teacher_here, patience=PATIENCE)
    if found is None:
        return ok(NAME, f"method={setup.config.method} asks it for nothing")
    rows = setup.student.text_config.vocab_size
    windows = teacher_windows(found, setup.config, setup.student.tokenizer, setup.student.end_tokens, rows)
    context = f"a context of {windows.context:,}" if windows.context else "an unknown context"
    return ok(NAME, f"{found.url} serves {windows.model!r} with {context}, token ids in and out")
