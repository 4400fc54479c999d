"""Evaluations on the page: the paper's Table 1 with intervals, paired differences, power, and how samples ended.

The figures are those of `topd eval`, by the same functions, from the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.evaluation.compare import comparison, labels
from topd.evaluation.results import SETTINGS, Results, benchmarks_in, read_results, summary
from topd.paper import MEAN, TABLE_1
from topd.report.forest import Estimate, forest
from topd.report.reading import check_version, clean, number, read_object
from topd.report.results import Score, score
from topd.report.svg import Figure
from topd.report.words import signed, span

SHARED = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "tokens at most", "engine": "engine"}
"""Settings that the page names, where all samples share them."""


@dataclass(frozen=True)
class Evaluated:
    """One model: its label, results and their summary, by benchmark."""

    label: str
    results: dict[str, Results]
    summaries: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EvaluationSection:
    """The section.

    Attributes:
        columns: benchmarks, and their mean.
        rows: a model's label and scores by column.
        paper: the same of the paper, where it has one of the columns; points.
        first: the model that the others are compared with.
        beside: (benchmark, points, interval, p, Holm, seen, needed, at best) by model.
        gain: points, which power is about.
        samples: (benchmark, n x k, right, ±, pass@k, maj@k, cut, unread, both, tokens) by model.
        notes: what the models do not share.
    """

    title: str
    lede: str
    columns: list[str]
    rows: list[tuple[str, list[Score | None]]]
    paper: list[tuple[str, list[float | None]]]
    first: str
    beside: list[tuple[str, list[tuple[str, ...]]]]
    gain: float
    samples: list[tuple[str, list[tuple[str, ...]]]]
    figure: Figure | None
    notes: list[str]


def load_evaluations(folders: Sequence[Path], notes: list[str]) -> list[Evaluated]:
    """What can be read of the models' folders; the rest is named in `notes`.

    Raises:
        ReportError: a newer version wrote one of them.
        TOPDError: two folders cannot be told apart.
    """
    found = []
    for label, folder in zip(labels(folders), folders, strict=True):
        for name in benchmarks_in(folder):
            file = folder / f"{name}{SETTINGS}"
            check_version(read_object(file, []), file)
        try:
            results = read_results(folder)
            found.append(Evaluated(clean(label), results, {name: summary(each) for name, each in results.items()}))
        except TOPDError as error:
            notes.append(clean(error))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            notes.append(f"The evaluation of {clean(label)} cannot be read ({type(error).__name__}); it was left out.")
    return found


def evaluation_section(models: Sequence[Evaluated]) -> EvaluationSection:
    """Raises `TOPDError` where models were asked other problems under the same name."""
    told = comparison({model.label: model.results for model in models})
    columns = [*told["columns"], *([MEAN] if len(told["columns"]) > 1 else [])]
    compared = told["comparisons"]
    return EvaluationSection(
        title="Evaluation",
        lede=_lede(models, told["columns"]),
        columns=[clean(name) for name in columns],
        rows=[(label, [score(row.get(name)) for name in columns]) for label, row in told["models"].items()],
        paper=[
            (label, [row.get(name) for name in columns])
            for label, row in TABLE_1.items()
            if set(told["columns"]) & row.keys()
        ],
        first=told["first"],
        beside=[
            (model.label, [_beside(row) for row in compared if row["model"] == model.label]) for model in models[1:]
        ],
        gain=100 * compared[0]["power"]["gain"] if compared else 0.0,
        samples=[(model.label, [_samples(*item) for item in model.summaries.items()]) for model in models],
        figure=_figure(compared, told["first"], columns) if compared else None,
        notes=[clean(note) for note in told["notes"]],
    )


def _lede(models: Sequence[Evaluated], columns: Sequence[str]) -> str:
    summaries = [each for model in models for each in model.summaries.values()]
    samples = sorted({each["samples"] for each in summaries})
    many = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    sets = f"{len(columns)} benchmarks" if len(columns) > 1 else clean(columns[0])
    lede = f"{len(models)} {'model' if len(models) == 1 else 'models'} on {sets}, "
    lede += f"{many} {'sample' if samples == [1] else 'samples'} of each problem"
    shared = []
    for name, words in SHARED.items():
        values = {str(each["settings"].get(name)) for each in summaries}
        if len(values) == 1 and (value := values.pop()) != "None":
            shared.append(f"{words} {clean(value)}")
    return f"{lede} ({', '.join(shared)})." if shared else f"{lede}."


def _beside(row: Mapping[str, Any]) -> tuple[str, ...]:
    power = row["power"]
    at_best = power["problems_at_best"]
    return (
        clean(row["column"]),
        signed(100 * row["mean"]),
        f"{signed(100 * row['low'])} to {signed(100 * row['high'])}",
        f"{row['p']:.2g}",
        f"{row['p_holm']:.2g}",
        f"{100 * power['detectable']:.1f}",
        f"{power['problems']:,}",
        "–" if at_best is None else f"{at_best:,}",
    )


def _samples(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    error = number(row["sampling_error"])
    return (
        clean(name),
        f"{row['problems']:,} × {row['samples']}",
        f"{100 * row['accuracy']['mean']:.1f}",
        "–" if error is None else f"{100 * error:.1f}",
        span(row["pass_at"][str(row["samples"])]),
        span(row["majority"]),
        *(f"{row[key]:,}" for key in ("truncated", "unparsed", "truncated_and_unparsed")),
        f"{row['tokens_mean']:,.0f}",
    )


def _figure(compared: Sequence[Mapping[str, Any]], first: str, columns: Sequence[str]) -> Figure:
    rows: dict[str, dict[str, Estimate]] = {clean(name): {} for name in columns}
    for row in compared:
        rows[clean(row["column"])][row["model"]] = (100 * row["mean"], 100 * row["low"], 100 * row["high"])
    rows = {name: found for name, found in rows.items() if found}
    described = "; ".join(
        f"{model}, {name} {signed(found[model][0])}" for name, found in rows.items() for model in found
    )
    svg = forest("evaluation", f"Points more than {first}: {described}.", rows, f"points more than {first[:40]}")
    caption = "On the same problems, with 95 % intervals over problems. Filled: the interval leaves out 0."
    return Figure(f"Difference from {first}", svg, caption)
