"""The top of the page: verdicts, what was compared, and which records each count comes from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from topd.paper import MEAN
from topd.report.elements import Group, Table, decimals, joined, listed, percent, plain, plural, signed, with_interval
from topd.report.reading import clean, mapping, mappings, number
from topd.report.records import Arm, Run
from topd.report.results import NAMES, Evaluated, problems, shared_settings

LONGEST = 600
"""Characters of a value that are shown."""
ByArm = list[tuple[str, list[str], bool]]
"""Rows of a table with a column per arm: name, value in each arm, whether they differ."""


# Verdicts


def verdicts(run: Run) -> list[str]:
    """What a demo and a study say about TOPD and OPD, one sentence each; none where nothing was compared."""
    difference = mapping(mapping(run.results.get("difference")).get("greedy"))
    count = problems(run.results)
    on = ["greedy", plural(count, "problem") if count else "", "1 training seed"]
    found = _verdict("TOPD", "OPD on this pair", difference, on), _study_verdict(run.study or {})
    return [text for text in found if text]


def _study_verdict(study: Mapping[str, Any]) -> str:
    arms = {clean(name): mapping(mapping(arm).get("greedy")) for name, arm in mapping(study.get("arms")).items()}
    compared = {name: mapping(arm.get("beside_opd")) for name, arm in arms.items()}
    compared = {name: each for name, each in compared.items() if number(each.get("mean")) is not None}
    held_out = number(mapping(study.get("plan")).get("held_out"))
    parts = []
    if topd := compared.pop("topd", None):
        count, seeds = plural(int(held_out or 0), "problem"), plural(len(topd.get("seeds") or ()), "training seed")
        parts.append(_verdict("TOPD", "OPD on this pair", topd, ["greedy", count if held_out else "", seeds]))
    if compared:
        different = [name for name, each in compared.items() if significant(each)]
        of = f"{plural(len(compared), 'other arm')}" if parts else plural(len(compared), "arm")
        what = f"{len(different)} of {of} ({listed(different)})" if different else f"None of {of}"
        parts.append(f"{what} {'are' if len(different) > 1 else 'is'} significantly different from OPD.")
    return " ".join(filter(None, parts))


def evaluation_verdicts(models: Sequence[Evaluated], found: Mapping[str, Any]) -> list[str]:
    """Each model against the first, on the mean of the benchmarks where there are several."""
    verdicts = []
    settings = [words for words in shared_settings(models) if words.startswith("temperature")]
    for model in models[1:]:
        rows = [row for row in found.get("comparisons", ()) if row["model"] == model.label]
        if not rows:
            continue
        row = next((row for row in rows if row["column"] == MEAN), rows[-1])
        shared = [name for name in model.summaries if name in models[0].summaries]
        count = sum(model.summaries[name]["problems"] for name in shared)
        names = "mean of " * (len(shared) > 1) + listed([clean(name) for name in shared])
        verdicts.append(_verdict(model.label, models[0].label, row, [names, *settings, plural(count, "problem")]))
    if len(verdicts) <= 4:
        return verdicts
    return [*verdicts[:4], f"The Evaluation section has {plural(len(verdicts) - 4, 'more comparison')}."]


def significant(difference: Mapping[str, Any]) -> bool:
    """Whether the 95 % interval excludes 0 and p, after Holm's correction where there is one, is below 0.05."""
    low, high, p = number(difference.get("low")), number(difference.get("high")), _p(difference)
    return low is not None and high is not None and (low > 0 or high < 0) and (p is None or p < 0.05)


def _p(difference: Mapping[str, Any]) -> float | None:
    p = number(difference.get("p_holm"))
    return number(difference.get("p")) if p is None else p


def _verdict(what: str, other: str, difference: Mapping[str, Any], on: Sequence[str]) -> str:
    """One sentence; empty without a difference and its interval."""
    mean, low, high = (number(difference.get(name)) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return ""
    outcome = "not significantly different from"
    if significant(difference):
        outcome = f"significantly {'better' if mean > 0 else 'worse'} than"
    numbers = f"{signed(100 * mean)} points, {signed(100 * low)} to {signed(100 * high)}"
    p = _p(difference)
    if (low > 0 or high < 0) and not significant(difference):
        numbers += f", but p = {p:.2g}" + (" after Holm’s correction" if "p_holm" in difference else "")
    return f"{what} is {outcome} {other}: {numbers}, {', '.join(filter(None, on))}."


# What was run


def lede(arms: Sequence[Arm]) -> str:
    if not arms:
        return ""
    steps = sorted({arm.steps for arm in arms})
    span = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    names = listed([NAMES.get(method, method) for method in dict.fromkeys(arm.method for arm in arms)])
    return f"{names}, {span} {'step' if steps[-1] == 1 else 'steps'}{' each' if len(arms) > 1 else ''}."


def setup(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Pair, data, batch, precision, device, seed, time and versions, as far as recorded; each value once."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in (item for part in (*map(facts, run.arms), _of_run(run)) for item in part.items()):
            found.setdefault(name, {})[value] = None
    shown = ("Pair", "Data", "Batch", "Precision", "Device", "Seed", "Total time", "Versions")
    return [(name, "; ".join(found[name])[:LONGEST]) for name in shown if name in found]


def facts(arm: Arm) -> dict[str, str]:
    """What an arm was made of, by name, as far as its `run.yaml` records it; each model by its name there."""
    record, options = arm.provenance, arm.settings
    models = {name: part for name, part in record.items() if isinstance(part, dict) and "architecture" in part}
    data, resumed = mapping(record.get("data")), mappings(record.get("resumed"))
    pair = [_short(models[name]) for name in ("student", "teacher") if name in models]
    found = {
        "Pair": " distilled from ".join(pair) if len(pair) == 2 else "",
        **{name: _model(part) for name, part in models.items()},
        "Data": f"{_count(data.get('rows'))} prompts, digest {data.get('digest')}" if data else "",
        "Batch": _batch(options, number(record.get("processes")) or 1),
        "Precision": joined(mapping(record.get("precision"))),
        "Device": " × ".join(str(record[name]) for name in ("processes", "device") if name in record),
        "Seed": str(options.get("seed", arm.options.get("seed", ""))),
        "Versions": joined(mapping(record.get("versions"))),
        "Command": record.get("command", ""),
        "Started": record.get("time", ""),
        "Resumed": "; ".join(_resumed(entry) for entry in resumed),
    }
    return {clean(name): clean(value)[:LONGEST] for name, value in found.items() if value}


def _of_run(run: Run) -> dict[str, str]:
    """What the results, the probe or the study of a run add to its arms."""
    seconds, known = number(run.results.get("seconds_total")), [facts(arm) for arm in run.arms]
    source = mapping(run.probe.result.get("run")) if run.probe else mapping((run.study or {}).get("plan"))
    pair = [str(source[name]) for name in ("student", "teacher") if source.get(name)]
    found = {
        "Pair": " distilled from ".join(pair) if len(pair) == 2 and not any("Pair" in each for each in known) else "",
        "Seed": str(run.results.get("seed", "")),
        "Total time": "" if seconds is None else _duration(seconds),
        "Versions": "" if any("Versions" in each for each in known) else joined(mapping(run.results.get("versions"))),
    }
    return {name: clean(value) for name, value in found.items() if value}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _short(model: Mapping[str, Any]) -> str:
    """A model's name without its folder, and its size."""
    size = number(model.get("parameters"))
    name = str(model.get("name")).rstrip("/")
    name = name.rpartition("/")[2] if name.startswith(("/", ".")) else name
    return name + ("" if size is None else f" ({size / 1e9:.1f} B)" if size >= 1e9 else f" ({size / 1e6:.1f} M)")


def _batch(options: Mapping[str, Any], processes: float) -> str:
    """Rollouts per optimizer step, and how they are made up."""
    each, steps = number(options.get("per_device_train_batch_size")), number(options.get("gradient_accumulation_steps"))
    if each is None:
        return ""
    parts = [(each, "per device"), (steps or 1, "accumulation steps"), (processes, "processes")]
    made = " × ".join(f"{count:.0f} {what}" for count, what in parts if count != 1 or what == "per device")
    total = each * (steps or 1) * processes
    rate = options.get("learning_rate")
    return f"{total:,.0f} rollouts per step ({made})" + ("" if rate is None else f", learning rate {rate}")


# Counts


def counts(runs: Sequence[Run]) -> Table:
    """Candidates, forks and false alarms, by the records that they were counted in."""
    rows = [row for run in runs for row in _counts(run, f"{run.name}: " if len(runs) > 1 else "")]
    head = ("Counted in", "Rollouts", "Candidates", "Forks", "False alarms", "False alarms, %")
    caption = "Every count of forks on this page is from one of these sources. Candidates are high-loss tokens; those "
    caption += "without a distance are neither forks nor false alarms."
    return Table("Table of counts by source", head, [Group(rows)], caption)


def _counts(run: Run, of: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm in run.arms:
        name = f"{of}{arm.name}" if len(run.arms) > 1 or not of else of.rstrip(": ")
        if arm.audited:
            rows.append(
                (f"{name}, audited rollouts of training", f"{arm.audited:,}", *_kinds([p.kind for p in arm.points]))
            )
        if (share := arm.mean("false_alarm_share")) is not None:
            candidates, forks = arm.mean("candidates/per_rollout"), arm.mean("forks/per_rollout")
            each = ("–" if value is None else f"{value:.2f} per rollout" for value in (candidates, forks))
            logged = plural(len(arm.series("false_alarm_share")[0]), "logged step")
            rows.append((f"{name}, whole run: mean over {logged}", "all", *each, "–", decimals(100 * share, 1)))
    if run.probe:
        rollouts = number(run.probe.result.get("rollouts"))
        *kinds, counted = _kinds([point.kind for point in run.probe.points])
        known = with_interval(percent(run.probe.result.get("false_alarm_share")), plain) or counted
        rows.append((f"{of}probe before training", "–" if rollouts is None else f"{rollouts:,.0f}", *kinds, known))
    return rows


def _kinds(kinds: Sequence[str]) -> tuple[str, str, str, str]:
    forks, alarms = kinds.count("fork"), kinds.count("alarm")
    share = f"{100 * alarms / (forks + alarms):.1f}" if forks + alarms else "–"
    return f"{len(kinds):,}", f"{forks:,}", f"{alarms:,}", share


# Tables with a column per arm


def option_rows(arms: Sequence[Arm]) -> ByArm:
    """Option, its value in each arm, and whether they differ; those that differ first."""

    def shown(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if len(text) <= 160 else f"{text[:160]}…"

    found = [{key: shown(value) for key, value in arm.options.items()} for arm in arms]
    return sorted(_by_arm(found, sorted({key for each in found for key in each})), key=lambda row: not row[2])


def provenance_rows(arms: Sequence[Arm]) -> ByArm:
    """Models, data, command and versions of each arm; empty where no arm has a `run.yaml`."""
    found = [facts(arm) if arm.provenance else {} for arm in arms]
    return _by_arm(found, [name for name in dict.fromkeys(name for each in found for name in each) if name != "Pair"])


def _by_arm(found: Sequence[Mapping[str, str]], names: Sequence[str]) -> ByArm:
    rows = [(name, [each.get(name, "–") for each in found]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _model(part: Mapping[str, Any]) -> str:
    revision = f" at {part['revision']}" if part.get("revision") else ""
    trained = number(part.get("trained"))
    return (
        f"{part.get('name')}{revision}: {part.get('architecture')}, {_count(part.get('parameters'))} parameters"
        f"{f', {trained:,.0f} trained' if trained else ''}, {part.get('dtype')}, weights {part.get('weights')}"
    )


def _resumed(entry: Mapping[str, Any]) -> str:
    changed = entry.get("changed")
    changes = ", ".join(map(str, changed)) if isinstance(changed, list) and changed else "unchanged"
    return f"from {entry.get('from')} ({changes})"


def _count(value: Any) -> str:
    found = number(value)
    return "an unknown number of" if found is None else f"{found:,.0f}"
