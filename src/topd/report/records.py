"""All records of a run.

A run is a trainer output folder (an arm); or a folder with `results.json` and such arms in it; or what `topd study`
or `topd eval` wrote; or what `topd probe` or `topd correct` wrote, alone or in the subfolders `probe` and `correct`.
Every file and every key may be missing. What cannot be read is counted in `notes`. Only records written by a newer
version are refused.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from topd.evaluation.compare import COMPARISON, evaluations_in
from topd.report.case import CorrectRecords, load_correct
from topd.report.elements import plural
from topd.report.probe import ProbeRecords, load_probe
from topd.report.reading import ReportError, clean, mapping, mappings, number, read_lines, read_object, read_run_file
from topd.report.rollouts import Candidate, Rollout, candidate_of, point_of, rollout_of
from topd.report.study import load_study

MAX_CANDIDATES = 2000
"""Candidates kept with their windows, newest steps first. Losses and distances of all others are kept as numbers."""


Row = tuple[str, str, str, str]
"""Problem, response, wanted answer, verdict."""


@dataclass
class Arm:
    """One trainer output folder."""

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)  # metrics by step, oldest first
    options: dict[str, Any] = field(default_factory=dict)  # topd's own
    settings: Mapping[str, Any] = field(default_factory=dict)  # all options, from its `run.yaml`
    provenance: Mapping[str, Any] = field(default_factory=dict)  # models, data and versions, from its `run.yaml`
    rollouts: list[Rollout] = field(default_factory=list)  # the newest audited ones, newest first
    points: list[Candidate] = field(default_factory=list)  # all audited candidates, also of rollouts that are not kept
    audited: int = 0  # number of audited rollouts
    responses: tuple[str, list[Row]] = ("", [])  # title and rows of those kept of the newest evaluation

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged and is finite."""
        if key == "token_loss/mean" and self.options.get("method") == "opd":
            key = "loss"  # with OPD the loss is the mean token loss, and nothing else is logged for it
        values = {entry["step"]: value for entry in self.log if (value := number(entry.get(key))) is not None}
        return sorted(values), [values[step] for step in sorted(values)]

    def mean(self, key: str) -> float | None:
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
    for rollout in read_lines(folder / "audit.jsonl", f"{arm.name}/audit.jsonl", notes, _rollout):
        arm.audited += 1
        arm.points += map(point_of, rollout.candidates)
        arm.rollouts.append(rollout)
        if len(arm.rollouts) % 256 == 0:  # a long run's windows need not all stay in memory
            arm.rollouts = _newest(arm.rollouts, keep)
    arm.rollouts = _newest(arm.rollouts, keep)
    arm.responses = _responses(folder / "eval_responses.jsonl", arm.name, notes)
    return arm


def _responses(file: Path, arm: str, notes: list[str]) -> tuple[str, list[Row]]:
    """The title of the newest evaluation's table, and its rows in the order of the problems."""
    newest = 0
    rows: dict[str, Row] = {}
    for step, problem, row in read_lines(file, f"{arm}/{file.name}", notes, _response):
        if step > newest:
            newest = step
            rows.clear()
        rows[problem] = row  # an evaluation can be repeated at a step
    return f"{plural(len(rows), 'response')} to held-out problems, step {newest}", list(rows.values())


def _response(record: Mapping[str, Any]) -> tuple[int, str, Row]:
    """The step, the problem in full, and the row; long texts without their middle."""

    def shown(text: str) -> str:
        return text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}"

    problem, response, answer = (clean(record[name]) for name in ("problem", "response", "answer"))
    verdict = ("right" if record["right"] else "wrong") + ("" if record.get("ended", True) else ", truncated")
    return int(record["step"]), problem, (shown(problem), shown(response), answer, verdict)


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
    rollout = rollout_of(record, record.get("rollout") or {}, candidates)
    teacher = clean(record.get("teacher") or "")
    return replace(rollout, title=f"{rollout.heading}, teacher {teacher}") if teacher else rollout


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

    Raises `ReportError` if there is nothing to read, or a record is newer than `RECORD_VERSION`.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: no such folder. Give one that topd demo, train, eval, study, probe or correct wrote."
        )
    notes: list[str] = []
    results = read_object(folder / "results.json", notes)
    folders = [path for path in sorted(folder.iterdir()) if is_arm(path) and not path.name.startswith("checkpoint-")]
    named = [arm["name"] for arm in mappings(results.get("arms")) if isinstance(arm.get("name"), str)]
    folders.sort(key=lambda path: named.index(path.name) if path.name in named else len(named))
    if is_arm(folder):
        folders = [folder]
    elif len({made for path in folders if (made := _made_of(path))}) > 1:
        first, *others = map(str, folders)
        compare = shlex.join([*others[:3], *["..."][: len(others) - 3 > 0]])
        raise ReportError(
            f"{folder} contains runs of different pairs or data. Choose one, or those to compare: topd report "
            f"{shlex.quote(first)} --compare {compare}"
        )
    probe, correct = load_probe(folder, notes, keep), load_correct(folder, notes)
    study = load_study(folder, notes)
    order = list(mapping(read_object(folder / COMPARISON, notes).get("models")))
    evaluations = sorted(evaluations_in(folder), key=lambda path: [*order, path.name].index(path.name))
    if not (folders or results or probe or correct or study or evaluations):
        raise ReportError(
            f"{folder} contains no records of a run: expected results.json, trainer_state.json, audit.jsonl, "
            "study.json, probe.json, correct.json or what topd eval wrote. Give the output folder of a run, and "
            "set audit_steps to record rollouts."
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


def load_runs(folders: list[Path]) -> list[Run]:
    """Several runs to be compared: their names are made different, and each arm says which run it is of."""
    runs = [load_run(folder) for folder in folders]
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
