"""What `topd probe` and `topd correct` left behind, read for the page. Nothing here needs a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.report.reading import check_version, clean, mapping, number, plan, read_lines, read_object, strings
from topd.report.records import Candidate, Point, Rollout

GROUPS = {"high": "high-loss", "random": "random", "low": "low-loss"}
"""Groups of places in a probe, in words."""


@dataclass
class ProbeRecords:
    """A probe.

    Attributes:
        result: `probe.json`.
        distances: by group, D_OT of each place.
        points: high-loss places.
        rollouts: those that are kept, high-loss places as candidates.
    """

    result: Mapping[str, Any]
    distances: dict[str, list[float]] = field(default_factory=lambda: {group: [] for group in GROUPS})
    points: list[Point] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)


@dataclass(frozen=True)
class Window:
    """The student's window at one time: tokens, D_OT to the teacher's, whether the continuation ends right."""

    name: str
    tokens: tuple[str, ...]
    distance: float | None
    right: bool | None


@dataclass(frozen=True)
class Case:
    """One fork that was corrected: the teacher's window, and the student's before and after each arm."""

    rollout: int
    position: int
    prefix: str
    teacher: tuple[str, ...]
    windows: tuple[Window, ...]


@dataclass
class CorrectRecords:
    """A local correction: `correct.json`, and its forks."""

    result: Mapping[str, Any]
    cases: list[Case]

    @property
    def arms(self) -> list[str]:
        """ "before", then the arms, in the order of the run."""
        return list(mapping(mapping(mapping(self.result.get("measures")).get("distance")).get("arms")))

    @property
    def steps(self) -> int | None:
        """Gradient steps on each window."""
        steps = number(mapping(mapping(self.result.get("run")).get("options")).get("steps"))
        return None if steps is None else int(steps)


def load_probe(folder: Path, notes: list[str], keep: int) -> ProbeRecords | None:
    """The probe in a folder or in its subfolder `probe`; None if there is none."""
    folder = _with(folder, "probe", "probe.json")
    result = read_object(folder / "probe.json", notes)
    if not result:
        return None
    check_version(result, folder / "probe.json")
    variant, threshold = str(result.get("variant")), number(result.get("threshold"))
    found = ProbeRecords(result)
    count = 0
    for rollout, distances in read_lines(
        folder / "probe_records.jsonl", "probe_records.jsonl", notes, lambda record: _probed(record, variant, threshold)
    ):
        for group, distance in distances:
            found.distances[group].append(distance)
        found.points += [Point(c.token_loss, c.distance, c.kind) for c in rollout.candidates]
        if count < keep:
            found.rollouts.append(rollout)
            count += max(1, len(rollout.candidates))
    return found


def load_correct(folder: Path, notes: list[str]) -> CorrectRecords | None:
    """The local correction in a folder or in its subfolder `correct`; None if there is none."""
    folder = _with(folder, "correct", "correct.json")
    result = read_object(folder / "correct.json", notes)
    if not result:
        return None
    check_version(result, folder / "correct.json")
    return CorrectRecords(
        result, list(read_lines(folder / "correct_records.jsonl", "correct_records.jsonl", notes, _case))
    )


def _with(folder: Path, sub: str, name: str) -> Path:
    return folder if (folder / name).is_file() else folder / sub


def _probed(
    record: Mapping[str, Any], variant: str, threshold: float | None
) -> tuple[Rollout, list[tuple[str, float]]]:
    """A rollout with its high-loss places as candidates, and (group, D_OT) of all places."""
    candidates, distances = [], []
    for place in record["places"]:
        distance = number(mapping(place.get("distance")).get(variant))
        if distance is not None and place["group"] in GROUPS:
            distances.append((place["group"], distance))
        if place["group"] == "high":
            candidates.append(_place(place, distance, threshold))
    return _rollout(record, candidates), distances


def _place(place: Mapping[str, Any], distance: float | None, threshold: float | None) -> Candidate:
    return Candidate(
        position=int(place["position"]),
        token=clean(place.get("token") or ""),
        token_loss=number(place.get("token_loss")),
        distance=distance,
        fork=distance is not None and threshold is not None and distance > threshold,
        decision="",
        student_window=strings(place.get("student_window")),
        teacher_window=strings(place.get("teacher_window")),
        plan=plan(place.get("plan")),
    )


def _rollout(record: Mapping[str, Any], candidates: list[Candidate]) -> Rollout:
    tokens = strings(record.get("tokens"))
    losses = [number(loss) for loss in record.get("token_loss") or ()][: len(tokens)]
    return Rollout(
        step=0,
        method="",
        prompt=clean(record.get("prompt") or ""),
        tokens=tokens,
        token_loss=(*losses, *[None] * (len(tokens) - len(losses))),
        candidates=tuple(sorted(candidates, key=lambda candidate: candidate.position)),
        title=f"Probe, rollout {int(record.get('rollout') or 0) + 1}",
    )


def _case(record: Mapping[str, Any]) -> Case:
    told = {"before": mapping(record.get("before"))} | {
        str(arm): mapping(outcome) for arm, outcome in mapping(record.get("after")).items()
    }
    return Case(
        rollout=int(record.get("rollout") or 0),
        position=int(record.get("position") or 0),
        prefix=clean(record.get("prefix") or ""),
        teacher=strings(record.get("teacher_window")),
        windows=tuple(
            Window(clean(name), strings(outcome.get("window")), number(outcome.get("distance")), outcome.get("right"))
            for name, outcome in told.items()
        ),
    )
