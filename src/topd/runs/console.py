"""What `topd train`, `topd warmstart` and the other commands print: log lines, progress, and the final summary."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from topd.runs.checkpoints import checkpoints
from topd.runs.records import AUDIT_FILE, EVAL_FILE

FIELDS = (
    ("loss", "loss {:7.4f}"),
    ("eval_loss", "evaluation loss {:.4f}"),
    ("eval_accuracy", "accuracy {0:.1%} ({1[eval_accuracy_low]:.1%} to {1[eval_accuracy_high]:.1%})"),
    ("eval_ended", "ended {:.1%}"),
    ("eval_repeated", "repeated {:.1%}"),
    ("eval_mean_length", "{:5.0f} tokens"),
    ("token_loss/mean", "token loss {:7.4f}"),
    ("forward_kl", "forward KL {:7.4f}"),
    ("cross_entropy", "cross-entropy {:7.4f}"),
    ("false_alarm_share", "false alarms {:4.0%}"),
    ("forks/per_rollout", "forks {:4.1f}"),
    ("completions/mean_length", "{:5.0f} tokens"),
    ("learning_rate", "lr {:.1e}"),
    ("step_time", "{:6.2f} s/step"),
)
"""Metrics of a log line, in order, as templates of the value and the whole log; those not logged are left out."""


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


def give_header(trainer: Any, header: Callable[[], Sequence[str]]) -> None:
    """Prepare a trainer that has a `ConsoleCallback`: give it the header, remove the libraries' progress bars."""
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, ConsoleCallback)]
    if ours and trainer.is_world_process_zero():
        for callback in ours:
            callback.header = header()
    for kind in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK) if ours else ():
        trainer.remove_callback(kind)


def header_lines(options: Mapping[str, Any], made_of: Mapping[str, Any], args: Any) -> list[str]:
    """What a run trains, before its first step: pair, data, batch, precision.

    Args:
        options: every option of the run.
        made_of: its record, as in `run.yaml`.
        args: the trainer's configuration.
    """
    models = {role: model for role, model in made_of.items() if isinstance(model, Mapping) and "weights" in model}
    lines = {}
    for role, model in models.items():
        partly = f" ({model['trained']:,} trained)" if 0 < model["trained"] < model["parameters"] else ""
        lines[role] = f"{model['name']}, {model['parameters']:,} parameters{partly}, {model['dtype']}"
    if "teacher" not in made_of and getattr(args, "teacher_model_server_url", None):
        lines["teacher"] = args.teacher_model_server_url
    rows = made_of["data"]["rows"]
    lines["data"] = f"{options.get('data') or 'a dataset'}, {'a stream' if rows is None else f'{rows:,} rows'}"
    if method := getattr(args, "method", None):
        windows = f", windows of {args.window_length} tokens" if args.looks_ahead else ""
        lines["method"] = f"{method}{windows}"
    sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    per_step = f"{math.prod(sizes)} rows per step ({sizes[0]} per process and batch"
    lines["batch"] = f"{per_step}, {sizes[1]} accumulated, {sizes[2]} process{'es' * (sizes[2] > 1)})"
    lines["computed"] = f"{made_of['precision']['computed']}, on {made_of['device']}"
    width = max(map(len, lines))
    return [f"{name:{width}}  {line}" for name, line in lines.items()]


@contextmanager
def loading(what: str, show: bool) -> Iterator[None]:
    """Say that models are loaded, and how long it took; on a terminal with the libraries' bars.

    Args:
        show: whether this process prints.
    """
    import transformers

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
    """The metrics of a log entry as text."""
    return [words.format(float(logs[key]), logs) for key, words in FIELDS if key in logs]


def evaluation_seconds(logs: Mapping[str, Any]) -> float:
    """What the evaluations in a log entry took."""
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
    import transformers

    hide_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def hide_progress_bars() -> None:
    """Hide the libraries' progress bars and FutureWarnings; other warnings and download bars stay."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars

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


ROWS = (
    ("loss", "loss, nats", "{:.4f}"),
    ("token_loss/mean", "token loss, nats", "{:.4f}"),
    ("forward_kl", "forward KL, nats", "{:.4f}"),
    ("cross_entropy", "cross-entropy, nats", "{:.4f}"),
    ("eval_loss", "evaluation loss, nats", "{:.4f}"),
    ("eval_accuracy", "accuracy, held-out problems", "{:.1%}"),
    ("false_alarm_share", "false alarms among candidates", "{:.1%}"),
    ("forks/per_rollout", "forks/rollout", "{:.2f}"),
    ("completions/mean_length", "tokens/response", "{:.1f}"),
    ("step_time", "s/step", "{:.2f}"),
)

Log = Sequence[dict[str, Any]]


def print_summary(log: Log, where: Sequence[str], steps: int, resumed: int = 0, console: Console | None = None) -> None:
    """Print how a run went, where the time went, and where its files are.

    Args:
        log: the trainer's log history.
        where: lines that name the files.
        resumed: the step after which this start resumed.
    """
    console = console or Console()
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
    for table in (metrics_table(log, steps, seconds, resumed), stages_table(log)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for line in where:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def metrics_table(log: Log, steps: int, seconds: float | None, resumed: int = 0) -> Table:
    """First and last value of each metric, and its mean over all logs, including those before a resume."""
    which = f", of which {steps - resumed}" if resumed else ""
    took = "" if seconds is None else f"{which} in {duration(seconds)}"
    here = [entry for entry in log if not resumed or entry.get("step", 0) > resumed]
    evaluating = sum(map(evaluation_seconds, here))
    took += f", {duration(evaluating)} of them evaluation" if took and evaluating else ""
    table = _table(f"{steps} steps{took}", ("", "first", "last", "mean"))
    for key, words, form in ROWS:
        if values := values_of(log, key):
            table.add_row(words, *map(form.format, (values[0], values[-1], sum(values) / len(values))))
    return table


def stages_table(log: Log) -> Table | None:
    """Mean seconds of each stage and its share of their sum; None if no stage was measured."""
    means = {name: sum(values) / len(values) for name in STAGES if (values := values_of(log, f"seconds/{name}"))}
    whole = sum(means.values())
    if not whole:
        return None
    table = _table("where the time goes", ("", "s/step", "share"))
    for name, mean in means.items():
        table.add_row(name, f"{mean:.3f}", f"{mean / whole:.0%}")
    return table


def where_weights_are(folder: Path) -> list[str]:
    """Lines that name the model and its checkpoints."""
    steps = [path.name.rpartition("-")[2] for path in checkpoints(folder)]
    listed = steps if len(steps) <= 6 else [*steps[:2], "...", steps[-1]]
    saved = [f"Checkpoints: {folder}/checkpoint-N, after steps {', '.join(listed)}"] if steps else []
    return [f"Model: {folder}", *saved]


def where_to_look(folder: Path) -> list[str]:
    """Lines that name the model, checkpoints and records of `topd train`, and the command that shows them."""
    audit, lines = folder / AUDIT_FILE, where_weights_are(folder)
    if audit.is_file():
        count = len(audit.read_bytes().splitlines())
        lines.append(f"Audit: {audit}, {count} rollouts with their candidates")
    else:
        lines.append("Audit: none (--audit_steps 10 records rollouts with their forks)")
    if (folder / EVAL_FILE).is_file():
        lines.append(f"Responses to held-out problems: {folder / EVAL_FILE}")
    return [*lines, f"The page of this run: topd report {shlex.quote(str(folder))}"]


def values_of(log: Log, key: str) -> list[float]:
    """The values logged under a name, in order."""
    return [float(entry[key]) for entry in log if key in entry]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=f"[bold]{title}[/bold]",
        title_style="",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table
