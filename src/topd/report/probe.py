"""What `topd probe` left behind, and its section: D_OT by group of tokens compared with the paper's pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.paper import CORRELATIONS, GROUPS, NEAR_ZERO, NEAR_ZERO_SHARES, PROBE
from topd.report.distances import groups_figure, readings_figure, scatter
from topd.report.elements import Group, Section, Table, decimals, percent, plain, share, with_interval
from topd.report.reading import clean, mapping, mappings, number, read_lines, read_object
from topd.report.rollouts import Candidate, Rollout, candidate_of, point_of, rollout_of, visible


@dataclass
class ProbeRecords:
    """`distances`: by reading of the student's window, the main one first, and by group, D_OT of each position."""

    result: Mapping[str, Any]  # `probe.json`
    distances: dict[str, dict[str, list[float]]]
    points: list[Candidate] = field(default_factory=list)  # high-loss positions
    rollouts: list[Rollout] = field(default_factory=list)  # those that are kept, high-loss positions as candidates


def load_probe(folder: Path, notes: list[str], keep: int) -> ProbeRecords | None:
    """The probe in a folder or in its subfolder `probe`; None if there is none."""
    folder = folder if (folder / "probe.json").is_file() else folder / "probe"
    result = read_object(folder / "probe.json", notes)
    if not result:
        return None
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
        found.points += map(point_of, rollout.candidates)
        if count < keep:
            found.rollouts.append(rollout)
            count += max(1, len(rollout.candidates))
    return found


def _probed(
    record: Mapping[str, Any], readings: Mapping[str, str], variant: str, threshold: float | None
) -> tuple[Rollout, list[tuple[str, str, float]]]:
    """A rollout with its high-loss positions as candidates, and (reading, group, D_OT) of all positions."""
    candidates, distances = [], []
    for place in record["places"]:
        measured = mapping(place.get("distance"))
        for kind, name in readings.items():
            distance = number(measured.get(name))
            if distance is not None and place["group"] in GROUPS:
                distances.append((kind, place["group"], distance))
        if place["group"] == "high":
            distance = number(measured.get(variant))
            fork = distance is not None and threshold is not None and distance > threshold
            candidates.append(candidate_of(place | {"distance": distance, "fork": fork}, decision=""))
    candidates.sort(key=lambda candidate: candidate.position)
    title = f"Probe, rollout {int(record.get('rollout') or 0) + 1}"
    return rollout_of(record, record, candidates, title), distances


def probe_section(probe: ProbeRecords, index: int = 0, of: str = "") -> Section:
    """`index`: of the run on the page; `of`: its name, where there are several."""
    result = probe.result
    run, threshold = mapping(result.get("run")), number(result.get("threshold"))
    lede = f"Before training: {clean(run.get('student', ''))} against {clean(run.get('teacher', ''))}, "
    lede += f"{number(result.get('rollouts')) or 0:.0f} rollouts."
    if threshold is not None:
        lede += f" Threshold: the upper quartile of D_OT at low-loss tokens, {threshold:.4g}. A high-loss token below "
        lede += "the threshold is a false alarm."
    section = Section(f"Probe{of}", lede)
    variants = mapping(result.get("variants"))
    readings = {clean(kind): mapping(variants.get(name)) for kind, name in mapping(result.get("readings")).items()}
    caption = "In parentheses: 95 % bootstrap intervals over rollouts. The paper’s pair: Qwen3-30B-A3B and Qwen3-4B."
    if len(readings) > 1:
        caption = (
            f"The student’s window in each reading, at the same positions with the same teacher windows. {caption}"
        )
    head = ("", *(readings if len(readings) > 1 else ["This pair"]), "Paper")
    rows = _quantities([result, *list(readings.values())[1:]])  # the first reading is the main one
    section.add("table", Table("Table of the probe", head, [Group(rows)], caption, paper=True))
    figures = [
        groups_figure(next(iter(probe.distances.values())), f"groups-{index}"),
        readings_figure(probe.distances, f"readings-{index}"),
        scatter(probe.points, "Token loss", f"probe-loss-{index}"),
        scatter(probe.points, "Teacher's NLL", f"probe-nll-{index}"),
    ]
    section.add("figures", [figure for figure in figures if figure])
    if len(variants) > 1:
        section.add("heading", "The same positions with other settings")
        head = ("Window / embedding / cost / K", "High", "Random", "Low", "False alarms, %", "Pearson", "Spearman")
        rows = [_variant(clean(name), mapping(found)) for name, found in variants.items()]
        section.add("table", Table("Table of variants", head, [Group(rows)]))
    return section.add("tokens", _tokens(result))


def _quantities(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row per quantity that is recorded: its value in each reading, and the paper's."""
    rows: list[tuple[str, ...]] = []

    def add(words: str, found: Sequence[Any], paper: str, form: Any = decimals, key: str = "value") -> None:
        if any(key in each for each in found):
            rows.append((words, *(with_interval(each, form, key) for each in found), paper))

    groups = {group: [mapping(mapping(each.get("groups")).get(group)) for each in results] for group in GROUPS}
    for group, words in GROUPS.items():
        n = number(groups[group][0].get("n"))
        of = "" if n is None else f" (n = {n:.0f})"
        add(f"Median D_OT, {words}{of}", groups[group], decimals(PROBE[group]), key="median")
    for group, words in GROUPS.items():
        near = [percent(each.get("near_zero")) for each in groups[group]]
        add(f"D_OT below {NEAR_ZERO}, {words}, %", near, share(NEAR_ZERO_SHARES[group]), plain)
    for name, words in CORRELATIONS.items():
        paper = decimals(PROBE[name.removesuffix("_nll")])
        add(words, [mapping(each.get(name)) for each in results], paper)
    alarms = [percent(each.get("false_alarm_share")) for each in results]
    add("False alarms among high-loss tokens, %", alarms, share(PROBE["false_alarm_share"]), plain)
    for group, words in GROUPS.items():
        begins = [percent(each.get("begins_with_candidate")) for each in groups[group]]
        add(f"Window begins with the candidate, {words}, %", begins, "", plain)
    return rows


def _variant(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    groups = mapping(found.get("groups"))
    medians = [decimals(number(mapping(groups.get(group)).get("median"))) for group in GROUPS]
    alarms = number(mapping(found.get("false_alarm_share")).get("value"))
    values = [decimals(number(mapping(found.get(key)).get("value"))) for key in ("pearson", "spearman")]
    return (name, *medians, share(alarms), *values)


def _tokens(result: Mapping[str, Any]) -> list[tuple[str, int, int, float]]:
    """Token, times it had a high loss, times it was a false alarm, the same as a percentage."""
    rows = []
    for entry in mappings(result.get("tokens"))[:24]:
        n, alarms = int(number(entry.get("n")) or 0), int(number(entry.get("false_alarms")) or 0)
        if n:
            rows.append((visible(clean(entry.get("token", ""))), n, alarms, 100 * alarms / n))
    return sorted(rows, key=lambda row: (-row[3], -row[1]))
