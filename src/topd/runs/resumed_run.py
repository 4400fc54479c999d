"""What differs between a run and the one whose checkpoint it resumes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Run = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Options and provenance, as `provenance.read_run` returns them."""

NOT_COMPARED = ("output_dir", "logging_dir", "run_name", "disable_tqdm", "preflight", "hub_model_id")
"""Options that change nothing that is trained."""
_MODEL = ("name", "revision", "architecture", "parameters", "trained", "dtype")


def compared(before: Run, now: Run) -> tuple[list[str], list[str]]:
    """Every difference in words, and those with which the checkpoint cannot be meant.

    Refused are a student of other shapes, other weights under its adapters, and another tokenizer. Everything else may
    be meant, and is reported.
    """
    changes = [
        f"{name}: {_shown(before[0][name])} -> {_shown(now[0][name])}"
        for name in now[0]
        if name in before[0] and name not in NOT_COMPARED and before[0][name] != now[0][name]
    ]
    changes += _environment(before[1], now[1])
    rows, now_rows = _part(before[1], "data"), _part(now[1], "data")
    if _differ(rows, now_rows, "digest"):
        changes.append(f"data: other prompts, {_shown(rows.get('rows'))} -> {_shown(now_rows.get('rows'))} rows")
    for role in sorted({*before[1], *now[1]}):
        old, new = _part(before[1], role), _part(now[1], role)
        if "weights" not in old or "weights" not in new:
            continue
        changes += [f"{role}'s {name}: {_shown(old[name])} -> {_shown(new[name])}" for name in _MODEL
                    if _differ(old, new, name)]  # fmt: skip
        # a student that is trained whole has the checkpoint's weights, whatever it began from
        if role != "student" and old.get("dtype") == new.get("dtype") and _differ(old, new, "weights"):
            changes.append(f"{role}: other weights")
    return changes, _refused(before[1], now[1])


def _refused(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = _part(before, "student"), _part(now, "student")
    refused = []
    if _differ(old, new, "shapes"):
        sizes = " -> ".join(f"{_shown(each.get('parameters'))} parameters" for each in (old, new))
        refused.append(f"the student's weights have other names or shapes ({sizes})")
    elif old.get("dtype") == new.get("dtype") and _differ(old, new, "frozen"):
        refused.append("the student's base, under the adapter, has other weights")
    if _differ(before, now, "tokenizer"):
        refused.append("the tokenizer is another one")
    return refused


def _environment(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = _part(before, "versions"), _part(now, "versions")
    changed = [f"{name} {_shown(old.get(name))} -> {_shown(new.get(name))}" for name in sorted({*old, *new})
               if old.get(name) != new.get(name)]  # fmt: skip
    return changed + [f"{name}: {_shown(before[name])} -> {_shown(now[name])}" for name in ("device", "processes")
                      if _differ(before, now, name)]  # fmt: skip


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> bool:
    """Whether both are known and not the same."""
    return old.get(name) is not None and new.get(name) is not None and old[name] != new[name]


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value:,}" if type(value) is int else f"{value}"[:100]
