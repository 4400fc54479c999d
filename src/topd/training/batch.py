"""What the step needs, as entries of TRL's batch: all [rollout, ...], so that TRL can shuffle and split them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from topd.near_future import Branches, Rollouts
from topd.training.guided import Guided

TEACHER = "teacher_number"
"""Entry [rollout] that says which of several teachers each has."""
_GUIDED = "guided_"
"""Prefix of the entries that hold a `Guided`."""


def rollouts_of(batch: dict[str, Any]) -> Rollouts:
    mask = batch["completion_mask"]
    loss_mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
    ids = batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"]
    return Rollouts(*ids, mask, loss_mask, batch.get(TEACHER))


def pack(guided: Guided) -> dict[str, Tensor]:
    entries = {
        "position": guided.branches.position,
        "window": guided.branches.tokens,
        "mask": guided.branches.mask,
        "weight": guided.weight,
        "tokens": guided.tokens,
        "teacher_hidden": guided.teacher_hidden,
    }
    return {_GUIDED + name: value for name, value in entries.items() if value is not None}


def unpack(batch: dict[str, Any]) -> Guided | None:
    entry = {name.removeprefix(_GUIDED): value for name, value in batch.items() if name.startswith(_GUIDED)}
    if not entry:
        return None
    branches = Branches(entry["position"], entry["window"], entry["mask"])
    return Guided(branches, entry["weight"], entry["tokens"], entry.get("teacher_hidden"))
