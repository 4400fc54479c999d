"""What each arm was made of, from its `run.yaml`: models, data, command, versions, what changed on resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from topd.report.reading import clean, mapping, mappings, number
from topd.report.records import Arm

LONGEST = 600
"""Characters of a value that are shown."""


def provenance_rows(arms: Sequence[Arm]) -> list[tuple[str, list[str], bool]]:
    """What, its value in each arm, and whether they differ; empty where no arm has a `run.yaml`."""
    facts = [provenance_facts(arm.provenance) for arm in arms]
    rows = []
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [each.get(name, "–") for each in facts]
        rows.append((name, values, len(set(values)) > 1))
    return rows


def provenance_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """A record in words, in the order in which a reader wants them."""
    models = {name: part for name, part in record.items() if isinstance(part, dict) and "architecture" in part}
    data, resumed = mapping(record.get("data")), mappings(record.get("resumed"))
    found = {name: _model(part) for name, part in models.items()} | {
        "data": f"{_count(data.get('rows'))} rows, digest {data.get('digest')}" if data else "",
        "precision": _pairs(record.get("precision")),
        "device": " x ".join(str(record[name]) for name in ("processes", "device") if name in record),
        "command": record.get("command", ""),
        "began": record.get("time", ""),
        "versions": _pairs(record.get("versions")),
        "resumed": "; ".join(_resumed(entry) for entry in resumed),
    }
    return {clean(name): clean(value)[:LONGEST] for name, value in found.items() if value}


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


def _pairs(value: Any) -> str:
    return ", ".join(f"{name} {each}" for name, each in mapping(value).items())


def _count(value: Any) -> str:
    found = number(value)
    return "an unknown number of" if found is None else f"{found:,.0f}"
