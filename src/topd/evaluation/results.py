"""From the samples in a folder to `eval.json`. Everything is computed from records, without a model."""

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from topd.errors import TOPDError
from topd.evaluation.accuracy import accuracy_interval, majority_value, pass_at_k, sampling_error
from topd.evaluation.statistics import Floats
from topd.paper import TABLE_1
from topd.runs.files import read_object, read_records, write_json

RESULT = "eval.json"
SETTINGS, SAMPLES = ".settings.json", ".samples.jsonl"
RECORD_KEYS = ("problem", "sample", "text", "truncated", "tokens", "right", "extracted", "parsed")


@dataclass(frozen=True)
class Results:
    """The samples of one model on one benchmark, equally many of each problem.

    Attributes:
        model: its label, which is the folder's name.
        settings: the sampling options, and the problems' ids and answers.
        records: `[problem][sample]`.
    """

    model: str
    benchmark: str
    settings: dict[str, Any]
    records: list[list[dict[str, Any]]]

    @property
    def right(self) -> Floats:
        """[problem, sample] 0 or 1"""
        return self.table("right")

    def table(self, key: str) -> Floats:
        """[problem, sample] of a number in the records."""
        return np.array([[float(record[key]) for record in row] for row in self.records])

    @property
    def ids(self) -> list[str]:
        """[problem] ids, which contain a digest of the text."""
        return [problem["id"] for problem in self.settings["problems"]]


def benchmarks_in(folder: Path) -> list[str]:
    """Names of the benchmarks with samples in a model's folder."""
    names = (file.name.removesuffix(SAMPLES) for file in folder.glob(f"*{SAMPLES}"))
    return sorted(name for name in names if (folder / f"{name}{SETTINGS}").is_file())


def read_results(folder: Path) -> dict[str, Results]:
    """Benchmark -> results; the paper's benchmarks first, in its order.

    Raises `TOPDError` if the folder has no samples, or a problem of a benchmark has none.
    """
    found = benchmarks_in(folder)
    if not found:
        raise TOPDError(f"{folder} contains no evaluation. Give a folder that `topd eval --out` wrote, or one in it.")
    papers = [name for name in TABLE_1["+ OPD"] if name in found]
    return {name: _read(folder, name) for name in [*papers, *(name for name in found if name not in papers)]}


def _read(folder: Path, name: str) -> Results:
    settings = read_object(folder / f"{name}{SETTINGS}", f"Run the same `topd eval` with another --out than {folder}.")
    by_problem: dict[str, dict[int, Any]] = {problem["id"]: {} for problem in settings["problems"]}
    for record in read_records(folder / f"{name}{SAMPLES}", RECORD_KEYS)[0]:
        by_problem.get(record["problem"], {})[record["sample"]] = record
    complete = next(k for k in count() if not all(k in samples for samples in by_problem.values()))
    if complete == 0:
        raise TOPDError(
            f"{folder}: not every problem of {name} has a sample yet. Run the same `topd eval` again to resume it."
        )
    records = [[samples[i] for i in range(complete)] for samples in by_problem.values()]
    return Results(folder.name, name, settings, records)


def write_result(folder: Path) -> dict[str, Any]:
    """Compute and write `eval.json`; return it."""
    benchmarks = {name: summary(each) for name, each in read_results(folder).items()}
    found = {"version": 1, "model": folder.name, "benchmarks": benchmarks}
    write_json(found, folder / RESULT)
    return found


def summary(results: Results) -> dict[str, Any]:
    """Accuracies from 0 to 1 with 95 % intervals, also per problem; counts of samples: truncated, unparsed, wrong."""
    right, truncated, unparsed = results.right, results.table("truncated"), 1 - results.table("parsed")
    k = right.shape[1]
    majority = [
        majority_value([r["extracted"] if r["parsed"] else None for r in row], [r["right"] for r in row])
        for row in results.records
    ]
    settings = {name: value for name, value in results.settings.items() if name != "problems"}
    return {
        "problems": len(right),
        "samples": k,
        "accuracy": asdict(accuracy_interval([right])),
        "sampling_error": sampling_error(right),
        "pass_at": {str(n): asdict(accuracy_interval([pass_at_k(right, n)])) for n in sorted({1, min(2, k), k})},
        "majority": asdict(accuracy_interval([majority])),
        "truncated": int(truncated.sum()),
        "unparsed": int(unparsed.sum()),
        "truncated_and_unparsed": int((truncated * unparsed).sum()),
        "wrong": int((1 - right - unparsed).sum()),
        "tokens_mean": float(results.table("tokens").mean()),
        "settings": settings,
        "by_problem": [
            problem | {"right": int(row.sum()), "accuracy": float(row.mean()), "majority": value}
            for problem, row, value in zip(results.settings["problems"], right, majority, strict=True)
        ],
    }
