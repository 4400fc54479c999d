"""Seconds per stage of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("rollout", "scoring", "windows", "calibration", "transport", "loss", "backward")


class Stopwatch:
    """Adds up wall-clock seconds by name. On CUDA it waits for the device, so that work is counted where it is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - started

    def take(self) -> dict[str, float]:
        """The seconds so far, and start anew."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
