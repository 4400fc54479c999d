"""What looking ahead finds, as the trainer carries it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from topd.algorithm import Transport
from topd.near_future import Windows


@dataclass(frozen=True)
class WindowPairs:
    """The two near futures at each of several places in a batch of rollouts.

    Attributes:
        rows, positions: [place] rollout and response position at which both windows start.
        ours, theirs: windows of student and teacher.
    """

    rows: Tensor
    positions: Tensor
    ours: Windows
    theirs: Windows

    @classmethod
    def cat(cls, parts: list[WindowPairs]) -> WindowPairs:
        """Several, one after the other; their rows must count on already."""
        return cls(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.positions for part in parts]),
            Windows.cat([part.ours for part in parts]),
            Windows.cat([part.theirs for part in parts]),
        )


@dataclass(frozen=True)
class Look:
    """What student and teacher make of rollouts. Candidates are ordered by rollout, then left to right.

    Attributes:
        token_loss: [rollout, position] nats.
        entropy: [rollout, position] of the student, nats.
        teacher_hidden: [rollout, position, width], kept so that the teacher runs once.
        candidates: windows at the high-loss positions.
        low_loss: windows at low-loss positions, where the fork threshold is being estimated; else None.
    """

    token_loss: Tensor
    entropy: Tensor
    teacher_hidden: Tensor
    candidates: WindowPairs
    low_loss: WindowPairs | None


@dataclass(frozen=True)
class NearFuture:
    """What looking ahead found in a batch of rollouts.

    Attributes:
        token_loss, entropy, teacher_hidden: as in `Look`.
        rows, positions: [candidate] where each candidate is.
        ours, theirs: windows of student and teacher at each candidate.
        ours_from_rollout: whether `ours` is the rollout's own path, so that nothing was generated for it.
        transport: between the windows.
        threshold: D_OT above which a candidate is a fork.
        low_loss_distance: [place] D_OT at the low-loss positions of this batch; None where they were not looked at.
        fork: [candidate] True at forks, False at false alarms.
        guided: [candidate] True where the trajectory loss applies.
        capped: [candidate] True where the token loss is capped.
        weights: [rollout, position] of the token losses; 1 unless capped.
    """

    token_loss: Tensor
    entropy: Tensor
    teacher_hidden: Tensor
    rows: Tensor
    positions: Tensor
    ours: Windows
    theirs: Windows
    ours_from_rollout: bool
    transport: Transport
    threshold: float
    low_loss_distance: Tensor | None
    fork: Tensor
    guided: Tensor
    capped: Tensor
    weights: Tensor


def joined(waves: list[Look]) -> Look:
    """Several waves of rollouts as one. Waves may differ in size: each one's rows follow those before it."""
    if len(waves) == 1:
        return waves[0]
    first_rows, count = [], 0
    for wave in waves:
        first_rows.append(count)
        count += len(wave.token_loss)
    numbered = list(zip(waves, first_rows, strict=True))
    low_loss = [_counting_from(first, wave.low_loss) for wave, first in numbered if wave.low_loss is not None]
    return Look(
        token_loss=torch.cat([wave.token_loss for wave in waves]),
        entropy=torch.cat([wave.entropy for wave in waves]),
        teacher_hidden=torch.cat([wave.teacher_hidden for wave in waves]),
        candidates=WindowPairs.cat([_counting_from(first, wave.candidates) for wave, first in numbered]),
        low_loss=WindowPairs.cat(low_loss) if low_loss else None,
    )


def _counting_from(first: int, pairs: WindowPairs) -> WindowPairs:
    return replace(pairs, rows=pairs.rows + first)
