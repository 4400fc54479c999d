"""`topd correct`: local correction of any pair, fork by fork. An interruption loses at most one fork."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console
from rich.table import Table

from topd.analysis.correct import ARMS, CorrectOptions, Corrector, Fork, Outcome
from topd.evaluation.statistics import bootstrap_mean, paired_difference
from topd.evaluation.tables import open_table
from topd.paper import LOCAL_CORRECTION
from topd.runs.console import progress
from topd.runs.files import append_records, write_json
from topd.runs.records import earlier_records

RECORDS, OPTIONS, RESULT = "correct_records.jsonl", "correct_options.json", "correct.json"
MEASURES = {
    "distance": "D_OT", "teacher_log_likelihood": "log p_T, nats", "agreement": "same token", "right": "ends right",
}  # fmt: skip


@dataclass(frozen=True)
class CorrectRun:
    """The settings of a local correction, for the record."""

    student: str
    teacher: str
    data: str
    rollouts: int
    max_new_tokens: int
    options: CorrectOptions
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str | None] = field(default_factory=dict)  # digest of each model: a folder may hold others later


def run_correct(
    run: CorrectRun, corrector: Corrector, forks: list[Fork], decode: Callable[[list[int]], str], out: Path
) -> dict[str, Any]:
    """Correct every fork with every arm, write `correct.json` and print the table. Returns its content."""
    console = Console()
    places = [(fork.rollout, fork.position, decode(fork.prefix.tolist())) for fork in forks]

    def place(record: dict[str, Any]) -> tuple[int, int, str]:  # another rollout may have a fork at the same position
        return record["rollout"], record["position"], record["prefix"]

    records = earlier_records(
        out / RECORDS, out / OPTIONS, asdict(run), needs=("rollout", "position", "prefix", "before", "after"),
        keep=lambda found: [record for record in found if place(record) in places], may_change="",
    )  # fmt: skip
    remaining = [fork for fork, at in zip(forks, places, strict=True) if at not in map(place, records)]
    write_json(asdict(run), out / OPTIONS)
    steps = len(remaining) * len(run.options.arms) * run.options.steps
    console.print(f"{len(forks)} forks, {len(records)} done; {steps} gradient steps remain.")
    with progress(console, "correcting", len(forks), len(records)) as advance:
        for fork in remaining:
            records.append(fork_record(fork, corrector, run.options.arms, decode))
            append_records(records[-1:], out / RECORDS)
            advance(1)
    result = conclude(run, sorted(records, key=lambda record: places.index(place(record))))
    write_json(result, out / RESULT)
    Console(width=max(92, console.width)).print(correct_table(result))
    shares = ", ".join(f"{arm} {ratio:.2g}" for arm, ratio in result["guidance_ratio"].items())
    if shares:
        console.print(f"|lambda grad L_traj| / |grad L_OPD| before the first step, median over forks: {shares}")
    console.print(f"Summary: {out / RESULT}. All windows before and after: {out / RECORDS}.", markup=False)
    return result


def fork_record(
    fork: Fork, corrector: Corrector, arms: tuple[str, ...], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """One fork: the prefix, the teacher's window, and the student's window before and after each arm."""

    def texts(ids: list[int]) -> list[str]:
        return [decode([token]) for token in ids]

    def figures(outcome: Outcome, ratio: float | None = None) -> dict[str, Any]:
        found = {name: getattr(outcome, name) for name in MEASURES} | {"window": texts(outcome.window)}
        return found if ratio is None else found | {"guidance_ratio": ratio}

    return {
        "version": 1, "rollout": fork.rollout, "position": fork.position, "token_loss": fork.token_loss,
        "prefix": decode(fork.prefix.tolist()),
        "teacher_window": texts(fork.theirs.tokens[0][fork.theirs.mask[0]].tolist()),
        "before": figures(corrector.outcome(fork)),
        "after": {arm: figures(*corrector.correct(fork, arm)) for arm in arms},
    }  # fmt: skip


def conclude(run: CorrectRun, records: list[dict[str, Any]]) -> dict[str, Any]:
    """`correct.json`: each measure before and after each arm, and its paired difference from OPD on the same window."""
    measures: dict[str, Any] = {}
    for name in MEASURES:
        if any(record["before"][name] is None for record in records):
            continue
        values = {"before": [float(record["before"][name]) for record in records]}
        values |= {arm: [float(record["after"][arm][name]) for record in records] for arm in run.options.arms}
        baselines = {arm: ARMS[arm].baseline for arm in run.options.arms if ARMS[arm].baseline in values}
        measures[name] = {
            "arms": {arm: _spread(each) for arm, each in values.items()},
            "beside_opd": {
                arm: asdict(paired_difference(values[arm], values[other]))
                for arm, other in baselines.items()
                if arm != other
            },
        }
    ratios = {arm: [record["after"][arm].get("guidance_ratio") for record in records] for arm in run.options.arms}
    medians = {arm: float(numpy.median(each)) for arm, each in ratios.items() if each and None not in each}
    return {
        "version": 1, "forks": len(records), "measures": measures, "guidance_ratio": medians, "run": asdict(run),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    quartiles = zip(("q1", "median", "q3"), numpy.quantile(values, [0.25, 0.5, 0.75]).tolist(), strict=True)
    return asdict(bootstrap_mean(values)) | dict(quartiles)


def correct_table(result: dict[str, Any]) -> Table:
    """One row per measure and arm: mean with interval, quartiles, and the difference from OPD on the same window."""
    columns = ("", "mean", "95 % interval", "quartiles", "vs. opd", "p", "paper")
    table = open_table(columns, f"Local correction: {result['forks']} forks")
    for measure, found in result["measures"].items():
        table.add_row(f"[bold]{MEASURES[measure]}[/bold]")
        for arm, row in found["arms"].items():
            difference = found["beside_opd"].get(arm)
            table.add_row(
                arm, f"{row['mean']:.3f}", f"{row['low']:.3g} to {row['high']:.3g}",
                f"{row['q1']:.2f} {row['median']:.2f} {row['q3']:.2f}",
                f"{difference['mean']:+.3f}" if difference else "", f"{difference['p']:.2g}" if difference else "",
                f"{LOCAL_CORRECTION[arm]:.3f}" if measure == "distance" and arm in LOCAL_CORRECTION else "",
            )  # fmt: skip
    return table
