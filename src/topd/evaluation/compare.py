"""Models compared on the same problems: the paper's Table 1 with intervals, and each model against the first."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.evaluation.accuracy import accuracy_difference, accuracy_interval, holm, power_of
from topd.evaluation.results import Results, benchmarks_in, read_results
from topd.paper import MEAN
from topd.runs.files import write_json

COMPARISON = "comparison.json"
PAPER_GAIN = 0.044
"""TOPD minus OPD in the paper's Table 1: 52.2 - 47.8 points, 4 of 90 problems."""


def evaluation_folders(given: Sequence[Path]) -> list[Path]:
    """The models' folders among the given folders and in them."""
    for folder in given:
        if not evaluations_in(folder):
            raise TOPDError(
                f"{folder} contains no evaluation. Give a folder that `topd eval --out` wrote, or one in it."
            )
    return list(dict.fromkeys(each for folder in given for each in evaluations_in(folder)))


def evaluations_in(folder: Path) -> list[Path]:
    """The folder itself if it is a model's, else the models' folders in it."""
    return [folder] if benchmarks_in(folder) else sorted(child for child in folder.glob("*") if benchmarks_in(child))


def compare(folders: Sequence[Path], out: Path, gain: float = PAPER_GAIN) -> dict[str, Any]:
    """Compute `comparison.json`, write it to the folder `out` and return it.

    `folders`: one per model, as `topd eval` wrote them; the others are compared with the first. `gain`: for the power
    of each comparison, in units of accuracy. Raises `TOPDError` if two folders have the same label, or different
    problems under the same name.
    """
    found = comparison(dict(zip(labels(folders), map(read_results, folders), strict=True)), gain)
    write_json(found, out / COMPARISON)
    return found


def comparison(models: Mapping[str, dict[str, Results]], gain: float = PAPER_GAIN) -> dict[str, Any]:
    """Each model's accuracy by benchmark and on average, and its difference from the first model; see `compare`.

    `models`: by label, as `read_results` returns them.
    """
    columns = list(dict.fromkeys(name for results in models.values() for name in results))
    rows: dict[str, dict[str, Any]] = {}
    for label, results in models.items():
        rows[label] = {
            name: asdict(accuracy_interval([r.right])) | {"samples": r.right.shape[1]} for name, r in results.items()
        }
        if len(columns) > 1 and len(results) == len(columns):  # the mean only if no benchmark is missing
            rows[label][MEAN] = asdict(accuracy_interval([results[name].right for name in columns]))
    first, *others = models
    comparisons: list[dict[str, Any]] = []
    notes: list[str] = []
    for other in others:
        comparisons += _differences(models[first], models[other], first, other, columns, gain)
        notes += _other_settings(models[first], models[other], first, other)
    for each, adjusted in zip(comparisons, holm([each["p"] for each in comparisons]), strict=True):
        each["p_holm"] = adjusted
    return {
        "version": 1, "columns": columns, "models": rows, "first": first, "comparisons": comparisons, "notes": notes,
    }  # fmt: skip


def labels(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with the parent's where two are the same."""
    names = [folder.resolve().name for folder in folders]
    found = [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for name, folder in zip(names, folders, strict=True)
    ]
    twice = [label for label in found if found.count(label) > 1]
    if twice:
        raise TOPDError(f"More than one folder is called {twice[0]}. Rename one of them.")
    return found


def _differences(
    first: dict[str, Results], other: dict[str, Results], base: str, label: str, columns: list[str], gain: float
) -> list[dict[str, Any]]:
    """The other model minus the first, on each benchmark that both have, and on their mean."""
    both = [name for name in columns if name in first and name in other]
    for name in both:
        if first[name].ids != other[name].ids:
            raise TOPDError(
                f"{base} and {label} answered different problems or prompts under the name {name}. Compare "
                "runs on the same file, with the same --limit."
            )
    sets = {name: [name] for name in both} | ({MEAN: both} if len(both) > 1 else {})
    compared = []
    for column, names in sets.items():
        a, b = ([side[name].right for name in names] for side in (other, first))
        compared.append(
            {"model": label, "beside": base, "column": column}
            | asdict(accuracy_difference(a, b))
            | {"power": asdict(power_of(a, b, gain=gain))}
        )
    return compared


def _other_settings(first: dict[str, Results], other: dict[str, Results], base: str, label: str) -> list[str]:
    """Notes on settings in which two models' evaluations differ."""
    notes = []
    for name in sorted(first.keys() & other.keys()):
        one, two = (side[name].settings | side[name].settings["versions"] for side in (first, other))
        keys = sorted(one.keys() & two.keys() - {"model", "fingerprint", "problems", "versions"})
        notes += [
            f"{name}: {key} is {one[key]} for {base} and {two[key]} for {label}" for key in keys if one[key] != two[key]
        ]
    return notes
