"""The windows that the student is trained on, and their targets as likelihood terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from topd.algorithm import Targets, make_targets, own_token_share
from topd.near_future import Branches, Rollouts
from topd.training.futures import NearFuture

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig


@dataclass(frozen=True)
class Guided:
    """The windows that the student is trained on, laid out by rollout so that they travel with the batch.

    Attributes:
        branches: the windows whose contexts the student is put in: its own, or the teacher's.
        weight: [rollout, branch, window_position, target_position]; rows sum to 1, or to 0 where not guided.
        tokens: [rollout, branch, target_position] that the columns of `weight` stand for.
        teacher_hidden: [rollout, branch, window_position, width] the teacher's states, where a KL needs them.
        context: whose window the branches are.
    """

    branches: Branches
    weight: Tensor
    tokens: Tensor
    teacher_hidden: Tensor | None = None
    context: Literal["student", "teacher"] = "student"

    @property
    def targets(self) -> Targets:
        """The same, with [rollout, branch] as one axis."""
        return Targets(self.weight.flatten(0, 1), self.tokens.flatten(0, 1))


def guided_windows(future: NearFuture, rollouts: Rollouts, options: TOPDConfig) -> Guided:
    """Lay the guided candidates out as [rollout, branch, ...]; at least one slot, empty if need be."""
    at_most = torch.bincount(future.rows[future.guided], minlength=len(rollouts)).max().clamp(min=1)
    slots = int(at_most)
    chosen = future.guided.nonzero().squeeze(-1)
    rows = future.rows[chosen]
    slot = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)  # rows are sorted

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(len(rollouts), slots, *values.shape[1:])
        out[rows, slot] = values
        return out

    ours, theirs = future.ours[chosen], future.theirs[chosen]
    windows = theirs if options.guidance_context == "teacher" else ours
    if options.guidance_context == "teacher":  # the teacher's window is both context and target
        targets = make_targets(
            "own", future.transport.plan[chosen], theirs.tokens, theirs.mask, theirs.tokens, theirs.mask
        )
    else:
        targets = make_targets(
            options.guidance_target, future.transport.plan[chosen], ours.tokens, ours.mask, theirs.tokens, theirs.mask
        )
    return Guided(
        Branches(spread(future.positions[chosen]), spread(windows.tokens), spread(windows.mask)),
        weight=spread(targets.weight),
        tokens=spread(targets.tokens),
        context=options.guidance_context,
    )


def own_share(guided: Guided) -> Tensor:
    """[guided position] how much of each target is the student's own token; in the student's contexts."""
    targets = guided.targets
    return own_token_share(targets, guided.branches.tokens.flatten(0, 1))[targets.guided]


def guided_rows(
    hidden: Tensor, window_hidden: Tensor, mask: Tensor, guided: Guided, on_rollout: bool
) -> tuple[Tensor, Tensor]:
    """The states that meet the vocabulary, and where each guided window position stands among them.

    Args:
        hidden: [rollout, position, width] of the rollouts; those under `mask` come first.
        window_hidden: [rollout, branch, window_position, width].
        on_rollout: the windows are the rollout's own path, so their states are there already.

    Returns:
        [row, width], and [rollout * branch, window_position] row numbers (of guided positions only).
    """
    positions = guided.targets.guided
    if on_rollout:
        row = (mask.flatten().cumsum(0) - 1).view(mask.shape)
        length = positions.shape[1]
        place = guided.branches.position[..., None] + torch.arange(length, device=mask.device)
        rollout = torch.arange(len(mask), device=mask.device)[:, None, None]
        return hidden[mask], row[rollout, place.clamp(max=mask.shape[1] - 1)].flatten(0, 1)
    rows = int(mask.sum()) + positions.flatten().cumsum(0).view(positions.shape) - 1
    return torch.cat([hidden[mask], window_hidden.flatten(0, 1)[positions]]), rows
