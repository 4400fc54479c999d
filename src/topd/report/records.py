"""What training left behind: an arm is one trainer output folder, read into small dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.report.reading import (
    clean,
    mappings,
    number,
    plan,
    read_lines,
    read_object,
    read_provenance,
    strings,
)
from topd.teachers.server_address import without_secrets

MAX_CANDIDATES = 2000
"""Candidates kept with their windows, newest steps first. Losses and distances of all others are kept as numbers."""


@dataclass(frozen=True)
class Candidate:
    """A high-loss position, and what became of it. `distance` (D_OT) is None where it was not measured."""

    position: int
    token: str
    token_loss: float | None
    distance: float | None
    fork: bool
    decision: str = "none"
    weight: float = 1.0
    student_window: tuple[str, ...] = ()
    teacher_window: tuple[str, ...] = ()
    plan: tuple[tuple[int, int, float], ...] = ()
    """(student position, teacher position, mass)"""
    teacher_nll: float | None = None
    """-log p_T of the token, nats; a probe records it."""

    @property
    def kind(self) -> str:
        """fork, alarm (a false alarm), or unknown if there is no distance."""
        if self.distance is None:
            return "unknown"
        return "fork" if self.fork else "alarm"


@dataclass(frozen=True)
class Rollout:
    """One audited response: text and token loss (nats, None where not finite) of each token, and its candidates."""

    step: int
    method: str
    prompt: str
    tokens: tuple[str, ...]
    token_loss: tuple[float | None, ...]
    candidates: tuple[Candidate, ...]
    title: str = ""
    """Heading on the page; empty: the step."""


@dataclass(frozen=True)
class Point:
    """A candidate as a dot: nats, D_OT, its `kind`, and the teacher's NLL of the token (nats) where it is recorded."""

    token_loss: float | None
    distance: float | None
    kind: str
    teacher_nll: float | None = None


@dataclass
class Arm:
    """One trainer output folder.

    Attributes:
        log: metrics by step, oldest first.
        options: what the run was started with.
        provenance: what it was made of, from its `run.yaml`.
        rollouts: the newest audited rollouts, newest first.
        points: all audited candidates, also those of rollouts that are not kept.
        audited: number of audited rollouts.
    """

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rollouts: list[Rollout] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    audited: int = 0

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
    arm.provenance = read_provenance(folder, notes)
    if isinstance(server := arm.options.get("teacher_window_server"), str):
        arm.options["teacher_window_server"] = without_secrets(server)  # an older run may have kept them
    for rollout in read_lines(folder / "audit.jsonl", f"{arm.name}/audit.jsonl", notes, _rollout):
        arm.audited += 1
        arm.points += [Point(c.token_loss, c.distance, c.kind) for c in rollout.candidates]
        arm.rollouts.append(rollout)
        if len(arm.rollouts) % 256 == 0:  # a long run's windows need not all stay in memory
            arm.rollouts = _newest(arm.rollouts, keep)
    arm.rollouts = _newest(arm.rollouts, keep)
    return arm


def _trainer_state(folder: Path) -> Path:
    """The trainer's state, or that of the newest checkpoint while training still goes on."""
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
    spoken = record.get("rollout") or {}
    tokens = strings(spoken.get("tokens"))
    losses = [number(loss) for loss in spoken.get("token_loss") or ()][: len(tokens)]
    return Rollout(
        step=int(record.get("step") or 0),
        method=clean(record.get("method") or ""),
        prompt=clean(record.get("prompt") or ""),
        tokens=tokens,
        token_loss=(*losses, *[None] * (len(tokens) - len(losses))),
        candidates=tuple(_candidate(candidate) for candidate in record.get("candidates") or ()),
    )


def _candidate(record: Mapping[str, Any]) -> Candidate:
    weight = number(record.get("weight"))
    return Candidate(
        position=int(record["position"]),
        token=clean(record.get("token") or ""),
        token_loss=number(record.get("token_loss")),
        distance=number(record.get("distance")),
        fork=bool(record.get("fork")),
        decision=clean(record.get("decision") or "none"),
        weight=1.0 if weight is None else weight,
        student_window=strings(record.get("student_window")),
        teacher_window=strings(record.get("teacher_window")),
        plan=plan(record.get("plan")),
    )
