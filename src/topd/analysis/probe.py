"""How many of a pair's high-loss tokens are false alarms? (Section 2.1, Fig. 2.)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch

from topd.algorithm import highest_loss, score_tokens
from topd.near_future import DistilledModel, Rollouts, near_future_transport

PAPER = {"high": 0.566, "random": 0.361, "low": 0.315, "false_alarm_share": 0.2923}
"""Median D_OT of each group, and the share, for the paper's pair."""


@dataclass(frozen=True)
class Probe:
    """D_OT at high-loss, random and low-loss positions (equal numbers), windows regenerated, greedy.

    Attributes:
        distances: by group "high", "random" and "low", D_OT of each position.
        rollout: by group, the rollout that each position belongs to.
    """

    distances: dict[str, numpy.ndarray]
    rollout: dict[str, numpy.ndarray]

    @property
    def threshold(self) -> float:
        """Upper quartile of D_OT at low-loss positions."""
        return float(numpy.quantile(self.distances["low"], 0.75))

    @property
    def false_alarm_share(self) -> float:
        """Share of high-loss positions with D_OT at most the upper quartile of the low-loss ones.

        By construction at least 75 % of the low-loss ones are.
        """
        return float((self.distances["high"] <= self.threshold).mean())

    def interval(self, samples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the share: rollouts are drawn anew, and the threshold with them."""
        rng = numpy.random.default_rng(seed)
        rollouts = numpy.unique(self.rollout["high"])
        shares = []
        for _ in range(samples):
            counts = numpy.bincount(rng.choice(rollouts, len(rollouts)), minlength=rollouts.max() + 1)
            low = numpy.repeat(self.distances["low"], counts[self.rollout["low"]])
            high = numpy.repeat(self.distances["high"], counts[self.rollout["high"]])
            shares.append((high <= numpy.quantile(low, 0.75)).mean())
        tail = (1 - level) / 2
        return float(numpy.quantile(shares, tail)), float(numpy.quantile(shares, 1 - tail))


@torch.no_grad()
def probe(
    student: DistilledModel,
    teacher: DistilledModel,
    rollouts: Rollouts,
    *,
    window_length: int = 50,
    share: float = 0.0225,
    seed: int = 0,
) -> Probe:
    """Measure D_OT at the highest, the lowest and random token losses of each rollout."""
    mask = rollouts.loss_mask.bool()
    ours, theirs = student.read(rollouts), teacher.read(rollouts)
    scores = score_tokens(
        ours.hidden[mask], student.head(), theirs.hidden[mask], teacher.head(), rollouts.response_ids[mask]
    )
    student_greedy, teacher_greedy = (
        torch.zeros_like(rollouts.response_ids).masked_scatter(mask, greedy)
        for greedy in (scores.student_greedy, scores.teacher_greedy)
    )
    loss = torch.zeros(mask.shape).masked_scatter(mask.cpu(), scores.kl.float().cpu())
    chance = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed))
    rankings = {"high": loss, "random": chance, "low": -loss}
    distances, origin = {}, {}
    for group, ranking in rankings.items():
        rows, positions = highest_loss(ranking, mask.cpu(), share=share).nonzero(as_tuple=True)
        rows, positions = rows.to(mask.device), positions.to(mask.device)
        our_windows = student.continue_(rollouts, ours, student_greedy, rows, positions, window_length)
        their_windows = teacher.continue_(rollouts, theirs, teacher_greedy, rows, positions, window_length)
        distance = near_future_transport(
            our_windows, their_windows, rollouts, rows, positions, student, teacher
        ).distance.cpu()
        known = distance.isfinite()
        distances[group], origin[group] = distance[known].numpy(), rows.cpu()[known].numpy()
    return Probe(distances, origin)
