"""One model on one benchmark: every sample is a line that is kept as soon as it is there."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from topd.evaluation.answers import verdict
from topd.evaluation.benchmarks import ProblemSet
from topd.evaluation.equivalence import check_installed
from topd.evaluation.responses import Engine, Request, Response, Sampling, as_chat
from topd.evaluation.results import RECORD_KEYS, SAMPLES, SETTINGS
from topd.runs.files import append_records
from topd.runs.resumable import earlier_records, write_options
from topd.version import __version__

SAMPLE_STRIDE = 100_000
"""The number of a response is `sample * SAMPLE_STRIDE + problem`: the same however many of either there are."""


@dataclass(frozen=True)
class EvalRun:
    """What the samples of one file depend on. How many there are is not among it: more can be added.

    Attributes:
        model: what answers: name, fingerprint, engine, dtype.
        chat: whether text prompts are put into the chat template, as the user's turn.
    """

    model: dict[str, Any]
    problem_set: ProblemSet
    sampling: Sampling
    chat: bool

    def settings(self) -> dict[str, Any]:
        """For the file beside the samples. Prompts are in it as digests (see `Problem.id`), answers as they are."""
        problems = [{"id": problem.id, "answer": problem.answer} for problem in self.problem_set.problems]
        named = {"benchmark": self.problem_set.name, "rule": self.problem_set.rule, "chat": self.chat}
        return {"version": 1, **named, **self.model, **asdict(self.sampling), "problems": problems}


def versions() -> dict[str, str]:
    """Of what can change a response or its verdict, where it is installed."""
    found = {"topd": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "math-verify"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def samples_file(folder: Path, benchmark: str) -> Path:
    return folder / f"{benchmark}{SAMPLES}"


def settings_file(folder: Path, benchmark: str) -> Path:
    return folder / f"{benchmark}{SETTINGS}"


def run_benchmark(run: EvalRun, engine: Engine, samples: int, folder: Path, console: Console) -> None:
    """Sample what is missing of `samples` responses to each problem, and judge it.

    Raises:
        TOPDError: the folder holds samples with other settings, or the engine cannot respond.
    """
    name, problems = run.problem_set.name, run.problem_set.problems
    file = samples_file(folder, name)
    requests = [
        Request(sample * SAMPLE_STRIDE + place, as_chat(problem.prompt, run.chat))
        for sample in range(samples)
        for place, problem in enumerate(problems)
    ]
    settings = run.settings()
    records = earlier_records(file, settings_file(folder, name), settings, needs=RECORD_KEYS, may_change="")
    write_options(settings_file(folder, name), settings | {"versions": versions()})
    places = {problem.id: place for place, problem in enumerate(problems)}
    done = {r["sample"] * SAMPLE_STRIDE + places[r["problem"]] for r in records if r["problem"] in places}
    missing = [request for request in requests if request.number not in done]
    console.print(
        f"{name}: {len(problems)} problems x {samples} samples of up to {run.sampling.max_new_tokens} tokens; "
        f"{len(requests) - len(missing)} of {len(requests)} are there."
    )
    if not missing:
        return
    if run.problem_set.rule == "math":
        check_installed()
    engine.check(missing, run.sampling)
    for batch in _with_progress(run, engine, missing, len(requests), console):
        append_records(batch, file)


def _with_progress(
    run: EvalRun, engine: Engine, missing: list[Request], total: int, console: Console
) -> Iterator[list[dict[str, Any]]]:
    """Records as they come, with a bar that shows the share of right ones among the new."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[told]}"), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task(run.problem_set.name, total=total, completed=total - len(missing), told="")
        new: list[dict[str, Any]] = []
        for batch in engine.respond(missing, run.sampling):
            records = [_record(run.problem_set, number, response) for number, response in batch]
            yield records
            new += records
            told = f"{sum(r['right'] for r in new) / len(new):.1%} right, {sum(r['tokens'] for r in new)} tokens"
            bar.update(task, advance=len(batch), told=told)


def _record(problem_set: ProblemSet, number: int, response: Response) -> dict[str, Any]:
    sample, place = divmod(number, SAMPLE_STRIDE)
    problem = problem_set.problems[place]
    judged = verdict(response.text, problem.answer, problem_set.rule)
    return {"problem": problem.id, "sample": sample, **asdict(response), **asdict(judged)}
