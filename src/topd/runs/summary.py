"""What `topd train` and `topd warmstart` print at the end of a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from topd.runs.checkpoints import checkpoints
from topd.runs.console import METRICS, STAGES, duration, evaluation_seconds
from topd.runs.records import AUDIT_FILE, EVAL_FILE

Log = Sequence[dict[str, Any]]


def print_summary(log: Log, where: Sequence[str], steps: int, resumed: int = 0, console: Console | None = None) -> None:
    """Print how a run went, where the time went, and `where` its files are. `resumed`: after which step."""
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
    for key, (_, words, form) in METRICS.items():
        if words and (values := values_of(log, key)):
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
    return [*lines, f"Report page: topd report {shlex.quote(str(folder))}"]


def values_of(log: Log, key: str) -> list[float]:
    return [float(entry[key]) for entry in log if key in entry]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=f"[bold]{title}[/bold]", title_style="", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        show_edge=False,
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table
