"""What `topd probe` and `topd correct` left behind, read for the page. Nothing here needs a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.paper import GROUPS
from topd.report.reading import check_version, clean, mapping, number, plan, read_lines, read_object, strings
from topd.report.records import Candidate, Point, Rollout


@dataclass
class ProbeRecords:
    """A probe.

    Attributes:
        result: `probe.json`.
        distances: by reading of the student's window, the main one first, and by group, D_OT of each place.
        points: high-loss places.
        rollouts: those that are kept, high-loss places as candidates.
    """

    result: Mapping[str, Any]
    distances: dict[str, dict[str, list[float]]]
    points: list[Point] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def main(self) -> dict[str, list[float]]:
        """`distances` of the main reading."""
        return next(iter(self.distances.values()))


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
    readings = {clean(kind): str(name) for kind, name in mapping(result.get("readings")).items()} or {"": variant}
    found = ProbeRecords(result, {kind: {group: [] for group in GROUPS} for kind in readings})
    count = 0
    for rollout, distances in read_lines(
        folder / "probe_records.jsonl", "probe_records.jsonl", notes,
        lambda record: _probed(record, readings, variant, threshold),
    ):  # fmt: skip
        for kind, group, distance in distances:
            found.distances[kind][group].append(distance)
        found.points += [Point(c.token_loss, c.distance, c.kind, c.teacher_nll) for c in rollout.candidates]
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
    record: Mapping[str, Any], readings: Mapping[str, str], variant: str, threshold: float | None
) -> tuple[Rollout, list[tuple[str, str, float]]]:
    """A rollout with its high-loss places as candidates, and (reading, group, D_OT) of all places."""
    candidates, distances = [], []
    for place in record["places"]:
        measured = mapping(place.get("distance"))
        for kind, name in readings.items():
            distance = number(measured.get(name))
            if distance is not None and place["group"] in GROUPS:
                distances.append((kind, place["group"], distance))
        if place["group"] == "high":
            candidates.append(_place(place, number(measured.get(variant)), threshold))
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
        teacher_nll=number(place.get("teacher_nll")),
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
