"""`topd study`: tune each arm with the same budget, run arms x seeds, compare. An interrupted study resumes."""

import multiprocessing
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console

from topd.errors import TOPDError
from topd.runs.files import PART, write_json
from topd.runs.provenance import versions
from topd.study.config import REFERENCE, ArmPlan, StudyPlan
from topd.study.run import (
    SCRATCH,
    Job,
    adapter_of,
    check_options,
    job_of,
    known_record,
    pair_tokenizer,
    run_job,
    what_it_is_made_of,
)
from topd.study.summary import WAYS, print_tables, summarise
from topd.study.tasks import task_of
from topd.version import STUDY_VERSION
from topd.visible import slug

RESULT = "study.json"
MOST_TIMES = 4
"""An arm with `time_of` takes at most this many times the study's steps."""
DIED = "a worker was killed, which stops all workers; memory may be too small for this many --workers"


def run_study(plan: StudyPlan, out: Path, workers: int = 1) -> dict[str, Any]:
    """Run the missing runs, write `study.json` after each, print the tables; return the content of `study.json`.

    Raises `TOPDError` if a model or the data cannot be used, or a run failed. Finished runs are saved and reused.
    """
    console = Console()
    for remains in [*out.glob(f"*/*/.*{SCRATCH}"), *out.glob(f"*/*/*.json.*{PART}"), *out.glob(f"{RESULT}.*{PART}")]:
        shutil.rmtree(remains) if remains.is_dir() else remains.unlink()  # of a killed study
    check_options(plan)  # these four check options, data, models and adapter before anything runs
    task_of(plan)
    pair_tokenizer(plan)
    adapter_of(plan)
    tuning = _tune(plan, out, workers, console)
    tuned = {name: best(scores) for name, scores in tuning.items()}
    plain = [arm for arm in plan.arms if arm.time_of is None]
    jobs = [_final(plan, arm, seed, tuned, out) for seed in plan.seeds for arm in plain]
    records = _run_all(plan, jobs, workers, console, lambda found: _write(plan, tuning, found, out))
    timed = [_timed(plan, arm, seed, tuned, records, out) for seed in plan.seeds for arm in plan.arms if arm.time_of]
    records |= _run_all(plan, timed, workers, console, lambda found: _write(plan, tuning, records | found, out))
    result = _write(plan, tuning, records, out)
    print_tables(result)
    console.print(f"Results: {out / RESULT}. Every answer: {out / 'runs'}.", markup=False)
    return result


def _tune(plan: StudyPlan, out: Path, workers: int, console: Console) -> dict[str, list[dict[str, Any]]]:
    """By arm, each choice with its mean sampled accuracy on the tuning problems over the tuning seeds."""
    jobs = {}
    for arm in plan.arms:
        for index, choice in enumerate(arm.choices):
            for seed in plan.tune_seeds:
                file = out / "tuning" / slug(arm.name) / f"{index}-{seed}.json"
                jobs[arm.name, index, seed] = replace(job_of(plan, arm, seed, choice, file), held_out=False)
    if not jobs:
        return {}
    console.print(f"Tuning: {len(jobs)} runs, on problems that are not held out.")
    records = _run_all(plan, list(jobs.values()), workers, console, lambda found: None)
    tuning: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in plan.arms if arm.choices}
    for arm in plan.arms:
        for index, choice in enumerate(arm.choices):
            of_seeds = [_accuracy(records[jobs[arm.name, index, seed].file]) for seed in plan.tune_seeds]
            tuning[arm.name].append({"choice": choice, "accuracy": sum(of_seeds) / len(of_seeds)})
    for name, scores in tuning.items():
        tried = ", ".join(f"{_words(each['choice'])}: {each['accuracy']:.1%}" for each in scores)
        console.print(f"  {name}: {_words(best(scores))}  ({tried})", markup=False)
    for line in unequal(tuning):
        console.print(f"  {line}", markup=False)
    return tuning


def unequal(tuning: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each tuned value of the reference that another arm, which tunes the same option, could not choose."""
    return [
        f"{name} could not choose {_words({option: value})}, the tuned value of {REFERENCE}, which may explain a "
        "difference between them. Add it to the arm's choices."
        for name, scores in tuning.items()
        for option, value in (best(tuning[REFERENCE]) if REFERENCE in tuning else {}).items()
        if value not in (values := {each["choice"].get(option) for each in scores}) and values != {None}
    ]


def best(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice with the highest accuracy; the first of equal ones."""
    return max(scores, key=lambda each: each["accuracy"])["choice"]


def _accuracy(record: dict[str, Any]) -> float:
    right = record["right"]["sampled"]
    return float(sum(right) / len(right))


def _final(plan: StudyPlan, arm: ArmPlan, seed: int, tuned: dict[str, Any], out: Path, steps: int = 0) -> Job:
    choice = dict(tuned.get(arm.tuned_as or arm.name, {}))
    if arm.options.get("method", "topd") != "topd":  # another arm's lambda does not apply without guidance
        choice.pop("guidance_weight", None)
    if arm.tuned_as:  # what the arm itself sets is what it is named for
        choice |= arm.options
    return job_of(plan, arm, seed, choice, out / "runs" / slug(arm.name) / f"{seed}.json", steps)


def _timed(
    plan: StudyPlan, arm: ArmPlan, seed: int, tuned: dict[str, Any], records: dict[Path, dict[str, Any]], out: Path
) -> Job:
    """The job of an arm with `time_of`: as many steps as OPD could take in that arm's time with the same seed."""
    other = next(each for each in plan.arms if each.name == arm.time_of)
    reference = next(each for each in plan.arms if each.name == REFERENCE)
    seconds = [records[_final(plan, each, seed, tuned, out).file]["seconds_training"] for each in (other, reference)]
    times = min(MOST_TIMES, max(1.0, seconds[0] / seconds[1]))
    choices = tuned | {arm.name: tuned.get(REFERENCE, {})}
    return _final(plan, arm, seed, choices, out, steps=round(plan.steps * times))


def _run_all(plan: StudyPlan, jobs: list[Job], workers: int, console: Console, each: Any) -> dict[Path, dict[str, Any]]:
    """Records by file; `each` is called with the records so far after every run."""
    made_of = what_it_is_made_of(plan)
    records = {job.file: record for job in jobs if (record := known_record(plan, job, made_of)) is not None}
    missing = [job for job in jobs if job.file not in records]
    if records and missing:
        console.print(f"{len(records)} of {len(jobs)} runs are done already.")
    failed: list[str] = []
    for job, outcome in _outcomes(plan, missing, workers):
        if isinstance(outcome, Exception):
            failed.append(f"{job.arm}, seed {job.seed}: {outcome}")
            continue
        records[job.file] = outcome
        done = f"[{len(records)}/{len(jobs)}]"
        found = f"{_accuracy(outcome):.1%} sampled, {outcome['seconds']:.0f} s"
        console.print(f"{done} {job.arm}, seed {job.seed}: {found}", markup=False, highlight=False)
        each(records)
    if failed:
        lines = "\n".join(f"  {line}" for line in failed[:5])
        raise TOPDError(f"{len(failed)} runs failed; the others are saved. Fix the cause and start again:\n{lines}")
    return records


def _outcomes(plan: StudyPlan, jobs: list[Job], workers: int) -> Iterable[tuple[Job, Any]]:
    gpus = _gpus()
    if len(gpus) < 2 and (workers == 1 or len(jobs) < 2):  # a process with several GPUs would split a model
        for job in jobs:
            yield job, _guarded(plan, job)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch can hang
    free = context.SimpleQueue()  # of GPUs, if there are any
    for gpu in islice(cycle(gpus), workers):
        free.put(gpu)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(free,)) as pool:
        futures = {pool.submit(_guarded, plan, job): job for job in jobs}
        for future in as_completed(futures):
            died = isinstance(future.exception(), BrokenProcessPool)
            yield futures[future], RuntimeError(DIED) if died else future.result()


def _gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _begin_worker(free: Any) -> None:
    """Start a worker, before it uses a GPU: it gets one GPU if there are any.

    It ends when the study is killed; it would otherwise wait forever and keep its memory.
    """

    def end_with_study() -> None:
        if (study := multiprocessing.parent_process()) is not None:
            study.join()
            os._exit(1)

    Thread(target=end_with_study, daemon=True).start()
    if not free.empty():
        os.environ["CUDA_VISIBLE_DEVICES"] = free.get()


def _guarded(plan: StudyPlan, job: Job) -> Any:
    """Run a job; return its error, so that other jobs continue."""
    try:
        return run_job(plan, job)
    except Exception as error:  # reported at the end, with arm and seed
        return RuntimeError(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")


def _write(plan: StudyPlan, tuning: dict[str, Any], records: dict[Path, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Write `study.json` from the records so far. The answers of a seed are a string such as "0110"."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in plan.arms}
    for record in records.values():
        by_arm[record["settings"]["arm"]][record["settings"]["seed"]] = record
    by_arm = {name: runs for name, runs in by_arm.items() if runs}
    found = {
        how: summarise({name: {seed: r["right"][how] for seed, r in runs.items()} for name, runs in by_arm.items()})
        for how in WAYS
    }
    arms: dict[str, dict[str, Any]] = {}
    for name, runs in by_arm.items():
        by_seed = {str(seed): record for seed, record in runs.items()}
        arms[name] = {how: found[how][name] for how in WAYS} | {
            "right": {
                seed: {how: "".join(str(int(each)) for each in r["right"][how]) for how in WAYS}
                for seed, r in by_seed.items()
            },
            "curve": {seed: r["curve"] for seed, r in by_seed.items()},
            "metrics": {seed: r.get("metrics", {}) for seed, r in by_seed.items()},
            "seconds_training": {seed: r["seconds_training"] for seed, r in by_seed.items()},
            "steps": {seed: r["settings"]["arm_steps"] for seed, r in by_seed.items()},
        }
    tuned = {name: best(scores) for name, scores in tuning.items()}
    result = {
        "version": STUDY_VERSION, "plan": asdict(plan), "tuning": tuning, "tuned": tuned, "arms": arms,
        "versions": versions(("torch", "transformers", "trl")),
    }  # fmt: skip
    write_json(result, out / RESULT, indent=None)
    return result


def _words(choice: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items()) or "unchanged"
