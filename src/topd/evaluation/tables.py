"""The tables that `topd eval` prints."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from topd.paper import MEAN, TABLE_1
from topd.visible import visible

LEGEND = (
    "±: standard error due to sampling on these problems. truncated: responses ended by the length limit. unparsed: "
    "responses without a readable answer, which count as wrong."
)
POWER_LEGEND = (
    "Holm: p adjusted for all rows of this table. min. detectable effect: the smallest gain, in points, that an "
    "evaluation of this size detects with 80 % power. problems needed: for a gain of {gain:.1f} points, with as many "
    "samples as here, and with unlimited samples. –: not known, since no problem's results differ."
)


def result_table(result: dict[str, Any]) -> Group:
    """One model, one row per benchmark."""
    shown = ("n x k", "right", "interval", "±", "pass@k", "maj@k", "truncated", "unparsed", "tokens")
    table = open_table(["", *shown])
    for name, row in result["benchmarks"].items():
        error = row["sampling_error"]
        table.add_row(
            plain(name),
            f"{row['problems']} x {row['samples']}",
            f"{100 * row['accuracy']['mean']:.1f}",
            _interval(row["accuracy"]),
            "" if error is None else f"{100 * error:.1f}",
            f"{100 * row['pass_at'][str(row['samples'])]['mean']:.1f}",
            f"{100 * row['majority']['mean']:.1f}",
            str(row["truncated"]),
            str(row["unparsed"]),
            f"{row['tokens_mean']:.0f}",
        )
    return Group("", f"[bold]{plain(result['model'])}: % right, 95 % intervals over problems[/bold]", table, LEGEND)


def comparison_tables(comparison: dict[str, Any]) -> Group:
    """The models with intervals, the paper's Table 1, and each model's difference from the first."""
    columns = [*comparison["columns"], *([MEAN] if len(comparison["columns"]) > 1 else [])]
    table = _labelled(columns)
    for label, row in comparison["models"].items():
        cells = (f"{100 * row[name]['mean']:.1f}\n{_interval(row[name])}" if name in row else "" for name in columns)
        table.add_row(plain(label), *cells)
    parts: list[Any] = ["", "[bold]% right, 95 % intervals over problems[/bold]", table]
    if set(columns) & (TABLE_1["+ OPD"].keys() - {MEAN}):
        paper = _labelled([name for name in columns if name in TABLE_1["+ OPD"]])
        for label, row in TABLE_1.items():
            paper.add_row(label, *(f"{row[name]:.1f}" for name in columns if name in row))
        parts += ["", "[bold]The paper's Table 1: its models, no intervals given[/bold]", paper]
    if comparison["comparisons"]:
        first, gain = plain(comparison["first"]), 100 * comparison["comparisons"][0]["power"]["gain"]
        parts += ["", f"[bold]Difference from {first} in points, on the same problems; sign-flip test[/bold]"]
        parts += [_difference_table(comparison), POWER_LEGEND.format(gain=gain)]
    return Group(*parts, *(f"Note: {plain(note)}." for note in comparison["notes"]))


def _difference_table(comparison: dict[str, Any]) -> Table:
    needed = ("min.\ndetectable", "problems\nneeded", "unlimited\nsamples")
    table = open_table(["", "points", "95 % interval", "p", "Holm", *needed])
    model = ""
    for row in comparison["comparisons"]:
        if row["model"] != model:
            model = row["model"]
            table.add_row(f"[bold]{plain(model)}[/bold]")
        power = row["power"]
        table.add_row(
            plain(row["column"]),
            f"{100 * row['mean']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['p']:.2g}",
            f"{row['p_holm']:.2g}",
            "–" if power["detectable"] is None else f"{100 * power['detectable']:.1f}",
            "–" if power["problems"] is None else str(power["problems"]),
            "" if power["problems_at_best"] is None else str(power["problems_at_best"]),
        )
    return table


def _labelled(columns: Sequence[str]) -> Table:
    """A table whose first column holds models, whose names are wrapped where they are too long."""
    table = open_table(["", *columns])
    table.columns[0].no_wrap = False
    return table


def open_table(columns: Sequence[str], title: str | None = None) -> Table:
    """A table without a frame: the column without a name is on the left, the others are right-aligned."""
    style: dict[str, Any] = {"padding": (0, 1, 0, 0)} if title else {"padding": 0, "show_edge": False}
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", **style)
    for name in columns:
        table.add_column(plain(name), justify="right" if name else "left", no_wrap=True)
    return table


def plain(text: str) -> str:
    """Text of a model, a file or a person as it is: brackets are no mark-up, and control characters are visible."""
    return escape(visible(text))


def _interval(value: dict[str, float]) -> str:
    return f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
