"""The fork threshold of section 2.1, estimated while training: the upper quartile of D_OT at low-loss positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from topd.algorithm import low_loss_threshold

WANTED = 512
"""Distances at low-loss positions that one estimate rests on: a standard error of some 0.02 in the quantile's rank."""
MOST_STEPS = 8
"""Steps that an estimate may take; with small batches it rests on fewer distances."""


@dataclass
class LowLossQuartile:
    """Collects D_OT at low-loss positions in the first steps, and anew every `every` steps (our choice).

    Args:
        every: optimizer steps from one estimate to the next.
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
