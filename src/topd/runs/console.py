"""What `topd train` and `topd warmstart` show: a line a log, in place of the libraries' bar and dictionary."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

FIELDS = (
    ("loss", "loss {:7.4f}"),
    ("eval_loss", "evaluation loss {:.4f}"),
    ("token_loss/mean", "token loss {:7.4f}"),
    ("forward_kl", "forward KL {:7.4f}"),
    ("cross_entropy", "cross-entropy {:7.4f}"),
    ("false_alarm_share", "false alarms {:4.0%}"),
    ("forks/per_rollout", "forks {:4.1f}"),
    ("completions/mean_length", "{:5.0f} tokens"),
    ("learning_rate", "lr {:.1e}"),
    ("step_time", "{:6.2f} s a step"),
)
"""Metrics of a line, in their order; those that were not logged are left out."""


def speak(trainer: Any) -> LogLines:
    """From now on the trainer's log comes as lines, from what is returned."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    lines = LogLines(Console())
    trainer.add_callback(lines)
    return lines


class LogLines(TrainerCallback):
    """Prints on the main process."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started, self.first = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        goes_on = f", going on after step {self.first}" if self.first else ""
        every = f"; a line every {state.logging_steps:g}" if args.logging_strategy == "steps" else ""
        self._print(state, f"{state.max_steps} steps{goes_on}{every}.")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = described(logs or {})
        if not parts:  # the end of training logs its own time
            return
        step = f"{state.global_step:{len(str(state.max_steps))}}/{state.max_steps}"
        done = state.global_step - self.first
        if done > 0 and "loss" in (logs or {}):
            left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            parts.append(f"{in_words(left)} left")
        self._print(state, "  ".join([step, *parts]))

    def _print(self, state: Any, text: str) -> None:
        if state.is_world_process_zero:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def described(logs: Mapping[str, Any]) -> list[str]:
    """A log's metrics in words."""
    return [words.format(float(logs[key])) for key, words in FIELDS if key in logs]


def in_words(seconds: float) -> str:
    """45 s; 3 min 20 s; 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
