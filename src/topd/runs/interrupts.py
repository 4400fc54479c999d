"""Ctrl-C and SIGTERM: the run finishes its step, saves a checkpoint, and prints how to resume."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from topd.errors import RunInterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWhenAsked(TrainerCallback):
    """Handles signals while a run trains. A second Ctrl-C stops it at once.

    SIGTERM may arrive more than once, and launchers forward signals that workers already got from the terminal. So a
    second signal counts only if it is Ctrl-C and arrives at least a second later. `any_process`: whether a value is
    true on any process, since all must stop after the same step.
    """

    def __init__(self, any_process: Callable[[bool], bool]) -> None:
        self.any_process = any_process
        self.received: int | None = None  # the first signal that this process got
        self.stopped = False  # whether a signal, to any process, ended the run
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in this block. Only the main thread gets signals; in other threads nothing changes."""
        self.received, self.stopped = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT and time.monotonic() - self._since > 1:
                raise KeyboardInterrupt
            return
        self.received, self._since = number, time.monotonic()
        text = (
            "\ntopd: finishing this step (or abandoning it, if it waits for a server), then saving a checkpoint. "
            "Ctrl-C again stops immediately and loses this step.\n"
        )
        with suppress(OSError):  # the output may be closed
            os.write(2, text.encode())  # print is not reentrant

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.any_process(self.received is not None) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


def run_interrupted(state: TrainerState, folder: Path, received: int | None) -> RunInterrupted:
    """The message after Ctrl-C or SIGTERM and a saved checkpoint; `received` is None if another process got it."""
    number = received or signal.SIGTERM
    if state.global_step == 0:
        return RunInterrupted("Stopped in the first step: nothing to save yet. Start the run again.", number)
    return RunInterrupted(
        f"Stopped after step {state.global_step} of {state.max_steps}. Saved: "
        f"{folder / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'}. Resume with the same command "
        "and --resume_from_checkpoint true.",
        number,
    )
