"""The table that `topd demo` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table


def results_table(results: dict[str, Any]) -> Group:
    """Accuracy with 95 % intervals, the paired difference, seconds a step and the overhead."""
    table = Table(title="Embedded task, held-out problems", title_justify="left")
    for column in ("", "greedy", "sampled", "s / step"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("teacher", f"{results['teacher']['greedy']:.1%}", "", "")
    table.add_row("student before", f"{results['student']['greedy']:.1%}", f"{results['student']['sampled']:.1%}", "")
    for arm in results["arms"]:
        table.add_row(
            f"+ {arm['name'].upper()}, {arm['steps']} steps",
            _with_interval(arm["greedy"]),
            _with_interval(arm["sampled"]),
            f"{arm['seconds_per_step']:.2f}",
        )
    return Group(table, *(_verdict(how, results["difference"][how]) for how in ("greedy", "sampled")), _cost(results))


def _with_interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def _verdict(how: str, difference: dict[str, float]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    clear = "" if low > 0 or high < 0 else ", not distinguishable from 0"
    return (
        f"TOPD - OPD, {how}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}, p = {difference['p']:.3f}, "
        f"n = {difference['n']} problems, one training seed{clear})"
    )


def _cost(results: dict[str, Any]) -> str:
    overhead, seconds = results["overhead"], results["seconds_total"]
    return f"A TOPD step takes {overhead:.2f} x an OPD step (paper: 1.41 x); {seconds:.0f} s in all."
