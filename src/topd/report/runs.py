"""What a run left behind, all of it. Nothing here needs a model.

A run is a trainer output folder (an arm); or a folder with `results.json` and such arms beneath it; or what `topd
study` or `topd eval` wrote; or what `topd probe` or `topd correct` wrote, alone or in the subfolders `probe` and
`correct`. Every file and every key may be missing: what is not there is not shown. What cannot be read is counted in
`notes`. Only records written by a newer version are refused, because they would be misread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.evaluation.compare import COMPARISON, evaluations_in
from topd.report.analyses import CorrectRecords, ProbeRecords, load_correct, load_probe
from topd.report.reading import ReportError, check_version, clean, mapping, mappings, read_object
from topd.report.records import MAX_CANDIDATES, Arm, is_arm, load_arm
from topd.report.study import load_study


@dataclass
class Run:
    """All records of a run. `notes` say, in sentences, what could not be read; `evaluations` are models' folders."""

    name: str
    arms: list[Arm]
    results: dict[str, Any]
    notes: list[str]
    probe: ProbeRecords | None = None
    correct: CorrectRecords | None = None
    study: dict[str, Any] | None = None
    evaluations: list[Path] = field(default_factory=list)


def load_run(folder: Path, *, keep: int = MAX_CANDIDATES) -> Run:
    """Read a run folder.

    Args:
        folder: see the module.
        keep: at least so many candidates of each arm stay with their windows, newest steps first.

    Raises:
        ReportError: if there is nothing to read in `folder`, or a record is newer than `RECORD_VERSION`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder. Give the output folder of a run.")
    notes: list[str] = []
    results = read_object(folder / "results.json", notes)
    check_version(results, folder / "results.json")
    folders = [path for path in sorted(folder.iterdir()) if is_arm(path) and not path.name.startswith("checkpoint-")]
    named = [arm["name"] for arm in mappings(results.get("arms")) if isinstance(arm.get("name"), str)]
    folders.sort(key=lambda path: named.index(path.name) if path.name in named else len(named))
    if is_arm(folder):
        folders = [folder]
    probe, correct = load_probe(folder, notes, keep), load_correct(folder, notes)
    study = load_study(folder, notes)
    evaluations = _evaluations(folder, notes)
    if not (folders or results or probe or correct or study or evaluations):
        raise ReportError(
            f"{folder} holds no records of a run: expected results.json, trainer_state.json, audit.jsonl, study.json, "
            "probe.json, correct.json or what topd eval wrote. Give the output folder of a run, and set audit_steps to "
            "record rollouts."
        )
    arms = [load_arm(path, notes, keep) for path in folders]
    missing = [name for name in named if name not in {arm.name for arm in arms}]
    if missing:
        notes.append(f"No records were found for: {', '.join(missing)}. Only their results are shown.")
    return Run(clean(folder.resolve().name), arms, results, notes, probe, correct, study, evaluations)


def _evaluations(folder: Path, notes: list[str]) -> list[Path]:
    """The models' folders in a folder, in the order of its comparison, if there is one."""
    order = list(mapping(read_object(folder / COMPARISON, notes).get("models")))
    return sorted(evaluations_in(folder), key=lambda path: order.index(path.name) if path.name in order else len(order))


def load_runs(folders: list[Path], *, keep: int = MAX_CANDIDATES) -> list[Run]:
    """Several runs to be compared: their names are made different, and each arm says which run it is of."""
    runs = [load_run(folder, keep=keep) for folder in folders]
    if len(runs) == 1:
        return runs
    names = [run.name for run in runs]
    for number, (run, folder) in enumerate(zip(runs, folders, strict=True), 1):
        if names.count(run.name) > 1:
            parent = clean(folder.resolve().parent.name)
            run.name = f"{parent[:24]}/{run.name}" if parent not in names else f"{run.name} {number}"
        for arm in run.arms:
            arm.name = run.name if len(run.arms) == 1 else f"{run.name}/{arm.name}"
    return runs
