"""Which positions the method looks at, caps and guides; the fork threshold of section 2.1, estimated in training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from topd.algorithm import TokenScores, false_alarm_threshold, highest_loss, low_loss_threshold, select_for_capping
from topd.near_future import Places, Rollouts
from topd.training.futures import Futures, Look
from topd.training.method import Method, Ranking, StepContext

LOW_LOSS = 16
"""Low-loss positions per rollout that the fork threshold is estimated from, at most (our choice)."""
WANTED = 512
"""Distances at low-loss positions that one estimate rests on: a standard error of some 0.02 in the quantile's rank."""
MOST_STEPS = 8
"""Steps that an estimate may take; with small batches it rests on fewer distances."""


@dataclass
class LowLossQuartile:
    """Collects D_OT at low-loss positions in the first steps, and anew every `every` steps (our choice).

    Args:
        every: batches of rollouts (the steps counted here) from one estimate to the next.
    """

    every: int
    value: float = math.nan
    _distances: list[float] = field(default_factory=list)
    _steps: int = 0

    def due(self, step: int) -> bool:
        """Whether low-loss positions are looked at in this step (from 0)."""
        return step % self.every < MOST_STEPS and (step % self.every == 0 or self._steps > 0)

    def add(self, step: int, distance: Tensor) -> None:
        """Add a step's distances, of all processes; NaN is left out.

        The first estimate is used from its first step on; a later one replaces it once it is complete.
        """
        if step % self.every == 0 and self._steps == 0:
            self._distances = []
        self._steps += 1
        self._distances += distance[distance.isfinite()].tolist()
        complete = len(self._distances) >= WANTED or self._steps >= MOST_STEPS
        if complete or math.isnan(self.value) or step < MOST_STEPS:
            self.value = low_loss_threshold(torch.tensor(self._distances))
        if complete:
            self._steps = 0


def choose_candidates(
    scores: TokenScores, rollouts: Rollouts, method: Method, max_per_rollout: int | None = None
) -> Places:
    """High-loss positions; the control "random" takes equally many positions of each rollout at random instead."""
    order, mask = ranking(scores, method.candidate_ranking), rollouts.loss_mask.bool()
    if method.guides and method.guidance_at == "random":
        order = torch.rand(order.shape, device=order.device)
    chosen = highest_loss(order, mask, share=method.candidate_share)
    if max_per_rollout is not None:
        chosen &= highest_loss(order, mask, share=None, count=max_per_rollout)
    return Places.marked(rollouts, chosen)


def ranking(scores: TokenScores, kind: Ranking) -> Tensor:
    """[rollout, position] what makes a position high-loss (nats)."""
    if kind == "teacher_nll":
        return scores.teacher_nll
    return scores.teacher_nll - scores.student_nll if kind == "log_ratio" else scores.kl


def choose_low_loss(token_loss: Tensor, candidates: Places) -> Places:
    """The positions with the lowest token loss, as many in each rollout as it has candidates, at most `LOW_LOSS`."""
    rollouts, chosen = candidates.rollouts, torch.zeros_like(token_loss, dtype=torch.bool)
    mask, counts = rollouts.loss_mask.bool(), torch.bincount(candidates.rows, minlength=len(rollouts))
    for row, count in enumerate(counts.clamp(max=LOW_LOSS).tolist()):
        if count:
            chosen[row] = highest_loss(-token_loss[row : row + 1], mask[row : row + 1], share=None, count=count)[0]
    return Places.marked(rollouts, chosen)


def fork_threshold(look: Look, method: Method, context: StepContext) -> float:
    """D_OT above which a candidate is a fork, by `fork_rule`, over all processes. Updates `context.quartile`."""
    if method.fork_rule == "threshold":
        assert method.fork_threshold is not None
        return method.fork_threshold
    if context.quartile is None:
        return false_alarm_threshold(context.gather(look.candidates.distance), method.false_alarm_share)
    if look.low_loss is not None:
        context.quartile.add(context.step, context.gather(look.low_loss.distance))
    return context.quartile.value


def choose_capped(fork: Tensor, candidates: Futures, method: Method, context: StepContext) -> Tensor:
    """Whose token loss is capped: false alarms, or the bottom share by rank over all processes, or its controls."""
    distance = candidates.distance
    if method.caps is None or method.caps == "false_alarms":
        return ~fork & distance.isfinite() if method.caps else torch.zeros_like(fork)
    owner = context.gather(torch.full_like(distance, context.process))
    chosen = select_for_capping(context.gather(distance), method.caps, method.false_alarm_share)
    return chosen[owner == context.process]


def choose_guided(fork: Tensor, candidates: Futures, method: Method) -> Tensor:
    """Where the trajectory loss applies: at forks; the control "false_alarms" takes the others."""
    if not method.guides:
        return torch.zeros_like(fork)
    return candidates.transport.converged & ~fork if method.guidance_at == "false_alarms" else fork
