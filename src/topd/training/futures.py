"""What looking ahead finds: both near futures at each place, and what follows for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topd.algorithm import Transport
from topd.near_future import Places, Windows


@dataclass(frozen=True)
class Futures:
    """The two near futures at each of several places, and the transport between them."""

    places: Places  # where both windows start
    ours: Windows  # the student's
    theirs: Windows  # the teacher's
    transport: Transport  # distance D_OT and plan, from the student's window (rows) to the teacher's (columns)

    @property
    def distance(self) -> Tensor:
        """[place] D_OT; NaN where there is none."""
        return self.transport.distance

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: Tensor) -> Futures:
        transport = Transport(*(values[which] for values in self.transport))
        return Futures(self.places[which], self.ours[which], self.theirs[which], transport)

    @classmethod
    def cat(cls, parts: Sequence[Futures]) -> Futures:
        """Futures of several batches as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            Places.cat([part.places for part in parts]),
            Windows.cat([part.ours for part in parts]),
            Windows.cat([part.theirs for part in parts]),
            Transport(*map(torch.cat, zip(*(part.transport for part in parts), strict=True))),
        )


@dataclass(frozen=True)
class Look:
    """What student and teacher make of rollouts."""

    token_loss: Tensor  # [rollout, position] nats
    entropy: Tensor  # [rollout, position] of the student, nats
    student_nll: Tensor  # [rollout, position] -log p_S of the sampled token, nats
    teacher_states: dict[str, Tensor]  # `Prefill.states` of the teacher, kept so that it reads the rollouts once
    candidates: Futures  # futures at the high-loss positions
    low_loss: Futures | None  # futures at low-loss positions, where the fork threshold is being estimated; else None

    @classmethod
    def cat(cls, waves: Sequence[Look]) -> Look:
        """Several waves of rollouts as one batch. Waves may differ in size."""
        if len(waves) == 1:
            return waves[0]
        low_loss = [wave.low_loss for wave in waves if wave.low_loss is not None]
        names = waves[0].teacher_states
        return cls(
            torch.cat([wave.token_loss for wave in waves]),
            torch.cat([wave.entropy for wave in waves]),
            torch.cat([wave.student_nll for wave in waves]),
            {name: torch.cat([wave.teacher_states[name] for wave in waves]) for name in names},
            Futures.cat([wave.candidates for wave in waves]),
            Futures.cat(low_loss) if low_loss else None,
        )


@dataclass(frozen=True)
class NearFuture:
    """What looking ahead found in a batch of rollouts, and what it decided."""

    look: Look  # scores, and futures at the candidates
    threshold: float  # D_OT above which a candidate is a fork
    fork: Tensor  # [candidate] True at forks, False at false alarms
    guided: Tensor  # [candidate] True where the trajectory loss applies
    capped: Tensor  # [candidate] True where the token loss is capped
    weights: Tensor  # [rollout, position] of the token losses; 1 unless capped

    @property
    def candidates(self) -> Futures:
        """Futures at the candidates."""
        return self.look.candidates

    @property
    def chosen(self) -> Futures:
        """Futures at the candidates where the trajectory loss applies."""
        return self.candidates[self.guided.nonzero().squeeze(-1)]
