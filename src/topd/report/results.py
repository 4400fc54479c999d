"""Accuracy on the page: `results.json` of a demo, and evaluations with the paper's Table 1, differences and power.

The figures of evaluations are those of `topd eval`, by the same functions, from the same records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from topd.errors import TOPDError
from topd.evaluation.compare import labels
from topd.evaluation.results import SETTINGS, Results, benchmarks_in, read_results, summary
from topd.paper import MEAN, PROBE, TABLE_1
from topd.report.elements import Figure, Group, Row, Score, Section, Table, percent, plain, share, signed, span
from topd.report.reading import clean, mapping, mappings, number, read_object
from topd.report.svg import Estimate, forest

_STUDENT, _OPD, _TOPD = (row[MEAN] for row in TABLE_1.values())
PAPER_SCORES = {"student": _STUDENT, "opd": _OPD, "opd-capped": 48.2, "topd": _TOPD}
"""Percent, mean of AIME24, AIME25 and HMMT25-Feb (Tables 1 and 2 of the paper). Another pair, another task."""
NAMES = {
    "teacher": "Teacher",
    "student": "Student, before training",
    "opd": "OPD",
    "opd-capped": "OPD, false alarms capped",
    "topd": "TOPD",
}
PAPER_NOTE = Markup(
    "<strong>The paper’s figures are of another pair and another task:</strong> Qwen3-30B-A3B to Qwen3-4B, mean of "
    "AIME24, AIME25 and HMMT25-Feb in percent; its share of false alarms is that of high-loss tokens below the upper "
    "quartile of distances at low-loss tokens. Compare the direction of the effects, not the numbers."
)


# results.json of a demo


def results_section(results: Mapping[str, Any], of: str = "") -> Section:
    """`of`: the run's name, where there are several. Without blocks if there is nothing to show."""
    section = Section(f"Results{of}").add("headlines", _headlines(results))
    rows, difference = _score_rows(results), _difference_row(results)
    groups = [Group(rows), *([Group([difference], style="total")] if difference else [])]
    count = problems(results)
    caption = "Percent of problems solved after training"
    caption += f", of {count:,} held-out problems" if count else ""
    caption += ", 95 % intervals over problems"
    if rows:
        section.add("table", Table("Table of results", ("", "Greedy", "Sampled", "Paper"), groups, caption, paper=True))
    return section.add("note", PAPER_NOTE) if section.blocks else section


def _headlines(results: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Numbers in large type: label, value, detail, what it was measured on, the paper's value for its own setting."""
    found = []
    difference = mapping(mapping(results.get("difference")).get("greedy"))
    count = problems(results)
    if (mean := number(difference.get("mean"))) is not None:
        p = number(difference.get("p"))
        detail = _interval(difference, signed) + ("" if p is None else f", p = {p:.2g}")
        on = f"{count:,} held-out problems" if count else "held-out problems"
        found.append((
            "TOPD minus OPD", f"{signed(100 * mean)} points", detail.lstrip(", "), f"{on} after training, greedy",
            f"{signed(_TOPD - _OPD)} points",
        ))  # fmt: skip
    alarms = mapping(results.get("false_alarm_share"))
    if (value := number(alarms.get("value"))) is not None:
        found.append((
            "False alarms among high-loss tokens", f"{100 * value:.1f} %", _interval(alarms),
            "the probe of the pair, before training", f"{100 * PROBE['false_alarm_share']:.2f} %",
        ))  # fmt: skip
    if (overhead := number(results.get("overhead"))) is not None:
        source = "the whole run: medians over all training steps"
        found.append(("Step time, TOPD relative to OPD", f"{overhead:.2f} ×", "", source, "1.41 ×"))
    return found


def _score_rows(results: Mapping[str, Any]) -> list[Row]:
    """Empty if nothing was evaluated."""
    arms = {str(arm.get("name")): arm for arm in mappings(results.get("arms"))}
    scored = {name: mapping(results.get(name)) for name in ("teacher", "student")} | arms
    rows: list[Row] = []
    for name in dict.fromkeys(("teacher", "student", *PAPER_SCORES, *arms)):
        entry = scored.get(name, {})
        row = (NAMES.get(name, name), score(entry.get("greedy")), score(entry.get("sampled")))
        paper = f"{PAPER_SCORES[name]:.1f}" if name in PAPER_SCORES else None
        if any(row[1:]) or paper:
            rows.append((*row, paper))
    return rows if any(row[1] or row[2] for row in rows) else []


def _difference_row(results: Mapping[str, Any]) -> Row | None:
    differences = [mapping(mapping(results.get("difference")).get(how)) for how in ("greedy", "sampled")]
    cells = [score(each, signed=True) if each else None for each in differences]
    return ("TOPD minus OPD, points", *cells, signed(_TOPD - _OPD)) if any(cells) else None


def problems(results: Mapping[str, Any]) -> int | None:
    """How many problems the arms were evaluated on, if all on equally many."""
    counts = {number(mapping(arm.get("greedy")).get("n")) for arm in mappings(results.get("arms"))}
    count = counts.pop() if len(counts) == 1 else None
    return None if count is None else int(count)


def score(value: Any, signed: bool = False) -> Score | None:
    found = percent(value) if isinstance(value, dict) else percent({"mean": value})
    if "mean" not in found:
        return None
    p = found["p"] / 100 if "p" in found else None
    return Score(found["mean"], found.get("low"), found.get("high"), p, signed)


def _interval(entry: Mapping[str, Any], form: Callable[[float], str] = plain) -> str:
    low, high = number(entry.get("low")), number(entry.get("high"))
    return "" if low is None or high is None else f"95 % interval {form(100 * low)} to {form(100 * high)}"


# Evaluations


@dataclass(frozen=True)
class Evaluated:
    """One model: its label, results and their summary, by benchmark."""

    label: str
    results: dict[str, Results]
    summaries: dict[str, dict[str, Any]]


def load_evaluations(folders: Sequence[Path], notes: list[str]) -> list[Evaluated]:
    """What can be read of the models' folders; the rest is named in `notes`.

    Raises `ReportError` if a newer version wrote one of them, `TOPDError` if two have the same name.
    """
    found = []
    for label, folder in zip(labels(folders), folders, strict=True):
        for name in benchmarks_in(folder):
            read_object(folder / f"{name}{SETTINGS}", [])  # refuses a newer version
        try:
            results = read_results(folder)
            found.append(Evaluated(clean(label), results, {name: summary(each) for name, each in results.items()}))
        except TOPDError as error:
            notes.append(clean(error))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            notes.append(f"The evaluation of {clean(label)} cannot be read ({type(error).__name__}); it was left out.")
    return found


def evaluation_section(models: Sequence[Evaluated], found: Mapping[str, Any]) -> Section:
    """`found`: what `comparison` returned for these models."""
    columns = [*found["columns"], *([MEAN] if len(found["columns"]) > 1 else [])]
    names, comparisons, first = [clean(name) for name in columns], found["comparisons"], found["first"]
    section = Section("Evaluation", _lede(models, found["columns"]))
    groups = [Group([(label, *(score(row.get(name)) for name in columns)) for label, row in found["models"].items()])]
    paper = [
        (label, *(plain(row.get(name)) for name in columns))
        for label, row in TABLE_1.items()
        if set(found["columns"]) & row.keys()
    ]
    heading = "The paper’s Table 1: its models, 30 problems per benchmark, no intervals given; its mean is of aime24, "
    groups += [Group(paper, heading + "aime25 and hmmt25", "paper")] if paper else []
    caption = "Percent solved, 95 % intervals over problems"
    section.add("table", Table("Table of the evaluation", ("", *names), groups, caption))
    section.add("list", [clean(note) for note in found["notes"]])
    if comparisons:
        section.add("figures", [_figure(comparisons, first, columns)])
        section.add("table", _differences(models[1:], comparisons, first))
    section.add("heading", "Samples")
    caption = Markup(
        "<b>±</b>: standard error from drawing samples on these problems. <b>Truncated</b>: responses that reached the "
        "length limit. <b>Unparsed</b>: responses without an answer that can be parsed. Both count as wrong unless "
        "their answer is right. pass@k and maj@k: k as in the second column, with 95 % intervals over problems."
    )
    head = ("", "n × k", "Solved, %", "±", "pass@k, %", "maj@k, %", "Truncated", "Unparsed", "Both", "Tokens, mean")
    groups = [Group([_samples(*item) for item in model.summaries.items()], model.label) for model in models]
    return section.add("table", Table("Table of samples", head, groups, caption))


def _lede(models: Sequence[Evaluated], columns: Sequence[str]) -> str:
    summaries = [each for model in models for each in model.summaries.values()]
    samples = sorted({each["samples"] for each in summaries})
    many = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    sets = f"{len(columns)} benchmarks" if len(columns) > 1 else clean(columns[0])
    lede = f"{len(models)} {'model' if len(models) == 1 else 'models'} on {sets}, "
    lede += f"{many} {'sample' if samples == [1] else 'samples'} per problem"
    shared = shared_settings(models)
    return f"{lede} ({', '.join(shared)})." if shared else f"{lede}."


def shared_settings(models: Sequence[Evaluated]) -> list[str]:
    """The sampling settings that all models share, in words."""
    summaries = [each for model in models for each in model.summaries.values()]
    shared = []
    for name in ("temperature", "top_p", "max_new_tokens", "engine"):
        values = {str(each["settings"].get(name)) for each in summaries}
        if len(values) == 1 and (value := values.pop()) != "None":
            shared.append(f"{name} {clean(value)}")
    return shared


def _differences(models: Sequence[Evaluated], comparisons: Sequence[Mapping[str, Any]], first: str) -> Table:
    groups = []
    for model in models:
        rows: list[Row] = []
        for row in comparisons:
            if row["model"] == model.label:
                power, unlimited = row["power"], row["power"]["problems_at_best"]
                rows.append((
                    clean(row["column"]), signed(100 * row["mean"]),
                    f"{signed(100 * row['low'])} to {signed(100 * row['high'])}", f"{row['p']:.2g}",
                    f"{row['p_holm']:.2g}", share(power["detectable"]), _count(power["problems"]), _count(unlimited),
                ))  # fmt: skip
        groups += [Group(rows, model.label)] if rows else []
    gain = 100 * comparisons[0]["power"]["gain"]
    caption = Markup(
        "Points minus {}, on the same problems; p by a sign-flip test, Holm’s correction over all rows. <b>Min. "
        "detectable effect</b>: the smallest gain that such an evaluation detects with 80 % power. <b>Problems "
        "needed</b>: to detect a gain of {:.1f} points with as many samples per problem, and with unlimited samples."
    ).format(first, gain)
    head = ("", "Points", "95 % interval", "p", "p (Holm)", "Min. detectable effect", "Problems needed",
            "With unlimited samples")  # fmt: skip
    return Table("Table of differences", head, groups, caption)


def _count(problems: int | None) -> str:
    return "–" if problems is None else f"{problems:,}"


def _samples(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    error = number(row["sampling_error"])
    return (
        clean(name),
        f"{row['problems']:,} × {row['samples']}",
        f"{100 * row['accuracy']['mean']:.1f}",
        share(error),
        span(row["pass_at"][str(row["samples"])]),
        span(row["majority"]),
        *(f"{row[key]:,}" for key in ("truncated", "unparsed", "truncated_and_unparsed")),
        f"{row['tokens_mean']:,.0f}",
    )


def _figure(comparisons: Sequence[Mapping[str, Any]], first: str, columns: Sequence[str]) -> Figure:
    rows: dict[str, dict[str, Estimate]] = {clean(name): {} for name in columns}
    for row in comparisons:
        rows[clean(row["column"])][row["model"]] = (100 * row["mean"], 100 * row["low"], 100 * row["high"])
    rows = {name: found for name, found in rows.items() if found}
    described = "; ".join(
        f"{model}, {name} {signed(found[model][0])}" for name, found in rows.items() for model in found
    )
    svg = forest("evaluation", f"Points minus {first}: {described}.", rows, f"points minus {first[:40]}")
    caption = "Same problems, 95 % intervals over problems. Filled: the interval excludes 0."
    return Figure(f"Difference from {first}", svg, caption)
