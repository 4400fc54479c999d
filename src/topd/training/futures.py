"""What looking ahead finds, as the trainer carries it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from topd.algorithm import Transport
from topd.near_future import Windows


@dataclass(frozen=True)
class Seen:
    """What student and teacher make of rollouts. Candidates are numbered rollout by rollout, left to right.

    Attributes:
        token_loss: [rollout, position] nats.
        entropy: [rollout, position] of the student, nats.
        teacher_hidden: [rollout, position, width], kept so that the teacher runs once.
        rows, positions: [candidate] where each candidate is.
        ours, theirs: windows of student and teacher at each candidate.
    """

    token_loss: Tensor
    entropy: Tensor
    teacher_hidden: Tensor
    rows: Tensor
    positions: Tensor
    ours: Windows
    theirs: Windows


@dataclass(frozen=True)
class NearFuture(Seen):
    """What looking ahead found in a batch of rollouts.

    Attributes:
        ours_from_rollout: whether `ours` is the rollout's own path, so that nothing was generated for it.
        transport: between the windows.
        fork: [candidate] True at forks, False at false alarms.
        guided: [candidate] True where the trajectory loss applies.
        capped: [candidate] True where the token loss is capped.
        weights: [rollout, position] of the token losses; 1 unless capped.
    """

    ours_from_rollout: bool
    transport: Transport
    fork: Tensor
    guided: Tensor
    capped: Tensor
    weights: Tensor


def joined(waves: list[Seen]) -> Seen:
    """Several waves as one; rows count on."""
    first_row = torch.tensor([len(wave.token_loss) for wave in waves]).cumsum(0) - len(waves[0].token_loss)
    if len(waves) == 1:
        return waves[0]
    return Seen(
        token_loss=torch.cat([wave.token_loss for wave in waves]),
        entropy=torch.cat([wave.entropy for wave in waves]),
        teacher_hidden=torch.cat([wave.teacher_hidden for wave in waves]),
        rows=torch.cat([wave.rows + int(start) for wave, start in zip(waves, first_row, strict=True)]),
        positions=torch.cat([wave.positions for wave in waves]),
        ours=Windows.cat([wave.ours for wave in waves]),
        theirs=Windows.cat([wave.theirs for wave in waves]),
    )
