"""The guided windows: what they are pulled towards, and how they travel with TRL's batch to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from topd.algorithm import Targets, make_targets, own_token_share
from topd.near_future import Branches, Rollouts
from topd.training.futures import Futures
from topd.training.method import Method

TEACHER = "teacher_number"
"""Entry [rollout] of the batch that says which of several teachers each rollout has."""
TEACHER_PROMPT_ENTRIES = ("teacher_prompt_ids", "teacher_prompt_mask")
"""Entries [rollout, prompt_position] of the batch that hold the teacher's own prompts, as in `Rollouts`."""
_STATES = {name: f"teacher_{name}" for name in ("hidden", "tokens", "log_probs")}
"""Entries of the batch that hold the teacher's `Prefill.states`."""
_GUIDED = "guided_"
"""Prefix of the entries that hold a `Guided`."""


@dataclass(frozen=True)
class Guided:
    """The windows that the student is trained on, laid out by rollout so that they travel with the batch."""

    branches: Branches  # the windows whose contexts the student is put in: its own, or the teacher's
    weight: Tensor  # [rollout, branch, window_position, target_position]; rows sum to 1, or to 0 where not guided
    tokens: Tensor  # [rollout, branch, target_position] that the columns of `weight` stand for
    # [rollout, branch, window_position, width] the teacher's states, where a KL needs them
    teacher_hidden: Tensor | None = None
    context: Literal["student", "teacher"] = "student"  # whose window the branches are

    @property
    def targets(self) -> Targets:
        """The same, with [rollout, branch] as one axis."""
        return Targets(self.weight.flatten(0, 1), self.tokens.flatten(0, 1))


def guided_windows(chosen: Futures, method: Method) -> Guided:
    """Lay the guided futures out as [rollout, branch, ...]; at least one slot, empty if need be."""
    places, ours, theirs, plan = chosen.places, chosen.ours, chosen.theirs, chosen.transport.plan
    rows, count = places.rows, len(places.rollouts)
    slots = int(torch.bincount(rows, minlength=count).max().clamp(min=1))
    slot = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)  # rows are sorted

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(count, slots, *values.shape[1:])
        out[rows, slot] = values
        return out

    kind = method.guidance_target
    if method.guidance_context == "teacher":  # the teacher's window is both context and target
        ours, kind = theirs, "same_index"
    targets = make_targets(kind, plan, ours.tokens, ours.mask, theirs.tokens, theirs.mask)
    return Guided(
        Branches(spread(places.positions), spread(ours.tokens), spread(ours.mask)),
        weight=spread(targets.weight),
        tokens=spread(targets.tokens),
        context=method.guidance_context,
    )


def own_share(guided: Guided) -> Tensor:
    """[guided position] how much of each target is the student's own token; in the student's contexts."""
    targets = guided.targets
    return own_token_share(targets, guided.branches.tokens.flatten(0, 1))[targets.guided]


def rollouts_of(batch: dict[str, Any]) -> Rollouts:
    """The rollouts of TRL's batch."""
    mask = batch["completion_mask"]
    loss_mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
    ids = batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"]
    return Rollouts(*ids, mask, loss_mask, batch.get(TEACHER), *map(batch.get, TEACHER_PROMPT_ENTRIES))


def pack(guided: Guided) -> dict[str, Tensor]:
    """As entries of the batch, all [rollout, ...], so that TRL can shuffle and split them."""
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
    """From the entries of the batch; None if it has none."""
    entry = {name.removeprefix(_GUIDED): value for name, value in batch.items() if name.startswith(_GUIDED)}
    if not entry:
        return None
    branches = Branches(entry["position"], entry["window"], entry["mask"])
    return Guided(branches, entry["weight"], entry["tokens"], entry.get("teacher_hidden"))


def pack_states(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's `Prefill.states` as entries of the batch."""
    return {_STATES[name]: values for name, values in states.items()}


def unpack_states(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The teacher's `Prefill.states` from the batch."""
    return {name: batch[entry] for name, entry in _STATES.items() if entry in batch}
