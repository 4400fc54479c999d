"""All records of a run.

A run is a trainer output folder (an arm); or a folder with `results.json` and such arms in it; or what `topd study`
or `topd eval` wrote; or what `topd probe` or `topd correct` wrote, alone or in the subfolders `probe` and `correct`.
Every file and every key may be missing. What cannot be read is counted in `notes`. Only records written by a newer
version are refused.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.evaluation.compare import COMPARISON, evaluations_in
from topd.report.case import CorrectRecords, load_correct
from topd.report.held_out import Row, load_responses
from topd.report.probe import ProbeRecords, load_probe
from topd.report.reading import (
    ReportError,
    check_version,
    clean,
    mapping,
    mappings,
    number,
    read_lines,
    read_object,
    read_run_file,
)
from topd.report.rollouts import Candidate, Rollout, candidate_of, point_of, rollout_of
from topd.report.study import load_study
from topd.teachers.server_address import without_secrets

MAX_CANDIDATES = 2000
"""Candidates kept with their windows, newest steps first. Losses and distances of all others are kept as numbers."""


@dataclass
class Arm:
    """One trainer output folder.

    Attributes:
        log: metrics by step, oldest first.
        options: topd's own options of the run.
        settings: all options of the run, from its `run.yaml`.
        provenance: models, data and versions, from its `run.yaml`.
        rollouts: the newest audited rollouts, newest first.
        points: all audited candidates, also those of rollouts that are not kept.
        audited: number of audited rollouts.
        responses: title and rows of those kept of the newest evaluation during training.
    """

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rollouts: list[Rollout] = field(default_factory=list)
    points: list[Candidate] = field(default_factory=list)
    audited: int = 0
    responses: tuple[str, list[Row]] = ("", [])

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged and is finite."""
        if key == "token_loss/mean" and self.options.get("method") == "opd":
            key = "loss"  # with OPD the loss is the mean token loss, and nothing else is logged for it
        values = {entry["step"]: value for entry in self.log if (value := number(entry.get(key))) is not None}
        return sorted(values), [values[step] for step in sorted(values)]

    def mean(self, key: str) -> float | None:
        """Mean of a metric over the logged steps, None if it was never logged."""
        values = self.series(key)[1]
        return sum(values) / len(values) if values else None

    @property
    def method(self) -> str:
        """The method by the options, else by the audit, else the folder's name."""
        audited = self.rollouts[0].method if self.rollouts else ""
        return str(self.options.get("method") or audited or self.name)

    @property
    def steps(self) -> int:
        """The last step that left a record."""
        return max([entry["step"] for entry in self.log] + [rollout.step for rollout in self.rollouts], default=0)


def is_arm(folder: Path) -> bool:
    """Whether a trainer wrote into this folder."""
    own = (folder / name for name in ("trainer_state.json", "audit.jsonl", "topd_config.json", "run.yaml"))
    return any(path.is_file() for path in (*own, *_checkpoints(folder)))


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoint-*/trainer_state.json"))


def load_arm(folder: Path, notes: list[str], keep: int) -> Arm:
    """The records of one trainer output folder."""
    arm = Arm(clean(folder.resolve().name))
    log = read_object(_trainer_state(folder), notes).get("log_history")
    arm.log = [
        {**entry, "step": int(entry["step"])} for entry in mappings(log) if number(entry.get("step")) is not None
    ]
    arm.options = read_object(folder / "topd_config.json", notes)
    arm.settings, arm.provenance = read_run_file(folder, notes)
    if isinstance(server := arm.options.get("teacher_model_server_url"), str):
        arm.options["teacher_model_server_url"] = without_secrets(server)  # an older run may have kept them
    for rollout in read_lines(folder / "audit.jsonl", f"{arm.name}/audit.jsonl", notes, _rollout):
        arm.audited += 1
        arm.points += map(point_of, rollout.candidates)
        arm.rollouts.append(rollout)
        if len(arm.rollouts) % 256 == 0:  # a long run's windows need not all stay in memory
            arm.rollouts = _newest(arm.rollouts, keep)
    arm.rollouts = _newest(arm.rollouts, keep)
    arm.responses = load_responses(folder / "eval_responses.jsonl", arm.name, notes)
    return arm


def _trainer_state(folder: Path) -> Path:
    """The trainer's state, or that of the newest checkpoint while training continues."""
    final = folder / "trainer_state.json"
    return final if final.is_file() else max(_checkpoints(folder), key=lambda path: path.stat().st_mtime, default=final)


def _newest(rollouts: list[Rollout], keep: int) -> list[Rollout]:
    """Newest steps first, until `keep` candidates are reached. A rollout without candidates counts as one."""
    kept, count = [], 0
    for rollout in sorted(rollouts, key=lambda rollout: -rollout.step):
        if count >= keep:
            break
        kept.append(rollout)
        count += max(len(rollout.candidates), 1)
    return kept


def _rollout(record: Mapping[str, Any]) -> Rollout:
    candidates = [candidate_of(candidate) for candidate in record.get("candidates") or ()]
    return rollout_of(record, record.get("rollout") or {}, candidates)


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
    """Read a run folder. At least `keep` candidates of each arm stay with their windows, newest steps first.

    Raises:
        ReportError: if there is nothing to read in `folder`, or a record is newer than `RECORD_VERSION`.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: there is no such folder. Give one that topd demo, train, eval, study, probe or correct wrote."
        )
    notes: list[str] = []
    results = read_object(folder / "results.json", notes)
    check_version(results, folder / "results.json")
    folders = [path for path in sorted(folder.iterdir()) if is_arm(path) and not path.name.startswith("checkpoint-")]
    named = [arm["name"] for arm in mappings(results.get("arms")) if isinstance(arm.get("name"), str)]
    folders.sort(key=lambda path: named.index(path.name) if path.name in named else len(named))
    if is_arm(folder):
        folders = [folder]
    elif len({made for path in folders if (made := _made_of(path))}) > 1:
        first, *others = map(str, folders)
        compare = shlex.join([*others[:3], *["..."][: len(others) - 3 > 0]])
        raise ReportError(
            f"{folder} holds runs of different pairs or data. Name one, or those to be compared: topd report "
            f"{shlex.quote(first)} --compare {compare}"
        )
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


def _made_of(folder: Path) -> tuple[Any, ...]:
    """Digests of a run's models and data, to see which runs belong together; empty if it has no record of them."""
    made_of = read_run_file(folder, [])[1]
    keys = (("student", "weights"), ("teacher", "weights"), ("data", "digest"))
    found = tuple(mapping(made_of.get(part)).get(key) for part, key in keys)
    return found if any(found) else ()


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
    for place, (run, folder) in enumerate(zip(runs, folders, strict=True), 1):
        if names.count(run.name) > 1:
            parent = clean(folder.resolve().parent.name)
            run.name = f"{parent[:24]}/{run.name}" if parent not in names else f"{run.name} {place}"
        for arm in run.arms:
            arm.name = run.name if len(run.arms) == 1 else f"{run.name}/{arm.name}"
    return runs
