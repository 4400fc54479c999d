"""What `topd train`, `topd warmstart` and the other commands print: log lines and progress."""

import logging
import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

METRICS = {
    "loss": ("loss {:7.4f}", "loss, nats", "{:.4f}"),
    "eval_loss": ("evaluation loss {:.4f}", "evaluation loss, nats", "{:.4f}"),
    "eval_accuracy": (
        "accuracy {0:.1%} ({1[eval_accuracy_low]:.1%} to {1[eval_accuracy_high]:.1%})", "accuracy, held-out problems",
        "{:.1%}",
    ),
    "eval_ended": ("ended {:.1%}", "", ""),
    "eval_repeated": ("repeated {:.1%}", "", ""),
    "eval_mean_length": ("{:5.0f} tokens", "", ""),
    "token_loss/mean": ("token loss {:7.4f}", "token loss, nats", "{:.4f}"),
    "forward_kl": ("forward KL {:7.4f}", "forward KL, nats", "{:.4f}"),
    "cross_entropy": ("cross-entropy {:7.4f}", "cross-entropy, nats", "{:.4f}"),
    "false_alarm_share": ("false alarms {:4.0%}", "false alarms among candidates", "{:.1%}"),
    "forks/per_rollout": ("forks {:4.1f}", "forks/rollout", "{:.2f}"),
    "completions/mean_length": ("{:5.0f} tokens", "tokens/response", "{:.1f}"),
    "learning_rate": ("lr {:.1e}", "", ""),
    "step_time": ("{:6.2f} s/step", "s/step", "{:.2f}"),
}  # fmt: skip
"""What a log line shows of a metric (a template of the value and the whole log); and, for those that the table at the
end has, their name and format there. In order; what is not logged is left out."""


class ConsoleCallback(TrainerCallback):
    """Prints a header, then one line per log step, in place of the libraries' progress bar. On the main process only.

    ```python
    trainer = TOPDTrainer(..., callbacks=[ConsoleCallback()])
    ```

    Args:
        console: where to print; by default plain text on standard output, also in a notebook.

    Attributes:
        first: the step after which this start resumed; 0 for a new run.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(force_jupyter=False)
        self.header: Sequence[str] = ()
        self.started, self.first = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        for line in self.header:
            self._print(state, line)
        resumed = f", resuming after step {self.first}" if self.first else ""
        every = f"; one line every {state.logging_steps:g}" if args.logging_strategy == "steps" else ""
        self._print(state, f"{state.max_steps} steps{resumed}{every}.")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.first:  # the steps that follow say how long the rest takes
            self.started += evaluation_seconds(logs or {})
        parts = formatted(logs or {})
        if not parts:  # the log at the end of training
            return
        step = f"{state.global_step:{len(str(state.max_steps))}}/{state.max_steps}"
        done = state.global_step - self.first
        if done > 0 and "loss" in (logs or {}):
            left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            parts.append(f"{duration(left)} left")
        self._print(state, "  ".join([step, *parts]))

    def _print(self, state: Any, text: str) -> None:
        if state.is_world_process_zero:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def give_header(trainer: Any, words: Mapping[str, str]) -> None:
    """Give a trainer's `ConsoleCallback`, if it has one, the header, and remove the libraries' progress bars."""
    width = max(map(len, words))
    for callback in trainer.callback_handler.callbacks[:]:
        if isinstance(callback, ConsoleCallback):
            callback.header = [f"{name:{width}}  {line}" for name, line in words.items()]
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)


def run_in_words(options: Mapping[str, Any], made_of: Mapping[str, Any], args: Any) -> dict[str, str]:
    """What a run trains: pair, data, method, batch, precision. `made_of`: its record in `run.yaml`."""
    words = {}
    for role, model in made_of.items():
        if isinstance(model, Mapping) and "weights" in model:
            name = f"{model['name']} at {model['revision']}" if model["revision"] else model["name"]
            partly = f" ({model['trained']:,} trained)" if 0 < model["trained"] < model["parameters"] else ""
            words[role] = f"{name}, {model['parameters']:,} parameters{partly}, {model['dtype']}"
    if "teacher" not in made_of and getattr(args, "teacher_model_server_url", None):
        words["teacher"] = args.teacher_model_server_url
    rows = made_of["data"]["rows"]
    words["data"] = f"{options.get('data') or 'a dataset'}, {'a stream' if rows is None else f'{rows:,} rows'}"
    if method := getattr(args, "method", None):
        words["method"] = f"{method}, windows of {args.window_length} tokens" if args.looks_ahead else method
    sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    per_step = f"{math.prod(sizes)} rows per step ({sizes[0]} per process and batch"
    words["batch"] = f"{per_step}, {sizes[1]} accumulated, {sizes[2]} process{'es' * (sizes[2] > 1)})"
    words["computed"] = f"{made_of['precision']['computed']}, on {made_of['device']}"
    return words


@contextmanager
def loading(what: str, show: bool) -> Iterator[None]:
    """Say that models are loaded, and how long it took; on a terminal with the libraries' bars. Only with `show`."""
    started = time.monotonic()
    if show:
        print(f"Loading {what} ...", flush=True)
    if show and sys.stderr.isatty():
        transformers.utils.logging.enable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.disable_progress_bar()
    if show:
        print(f"Loaded in {duration(time.monotonic() - started)}.", flush=True)


def formatted(logs: Mapping[str, Any]) -> list[str]:
    return [line.format(float(logs[key]), logs) for key, (line, _, _) in METRICS.items() if key in logs]


def evaluation_seconds(logs: Mapping[str, Any]) -> float:
    return sum(float(value) for key, value in logs.items() if key.startswith("eval_") and key.endswith("_runtime"))


def duration(seconds: float) -> str:
    """45 s; 3 min 20 s; 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def silence_libraries() -> None:
    """Hide the libraries' warnings and progress bars; errors and download bars stay."""
    hide_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def hide_progress_bars() -> None:
    """Hide the libraries' progress bars and FutureWarnings; other warnings and download bars stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    enable_progress_bars()


@contextmanager
def progress(console: Console, description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar. The yielded function takes how many more are done, and a note to show behind the bar."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda advance, note="": bar.update(task, advance=advance, note=note)


STAGES = ("rollout", "scoring", "windows", "calibration", "transport", "loss", "backward")


class Stopwatch:
    """Adds up wall-clock seconds by name. On CUDA it synchronizes, so that each stage counts its own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - started

    def take(self) -> dict[str, float]:
        """Return the seconds so far and reset."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Drop what is measured within: an evaluation is no part of a step."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        try:
            yield
        finally:
            self.seconds = seconds

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
