"""How to measure: interleaved timing, peak memory in a fresh process, parity before either.

Nothing here knows a case. Numbers compare only inside one run, so everything reported is a ratio of sides that took
turns in one process, with the spread of the repeats' ratios.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def wall_clock(function: Callable[[], object]) -> float:
    """Seconds that one call takes, the GPU's queue included."""
    _wait_for_gpu()
    started = time.perf_counter()
    function()
    _wait_for_gpu()
    return time.perf_counter() - started


def process_clock(function: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads, that one call takes: a busy machine changes them little."""
    started = time.process_time()
    function()
    return time.process_time() - started


def _wait_for_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of each side, one entry a repeat; entries of one repeat were taken one after the other."""

    seconds: Mapping[str, list[float]]

    @property
    def repeats(self) -> int:
        return len(next(iter(self.seconds.values())))

    def ratios(self, ours: str, beside: str) -> list[float]:
        """Of each repeat."""
        return [a / b for a, b in zip(self.seconds[ours], self.seconds[beside], strict=True)]

    def ratio(self, ours: str, beside: str) -> float:
        """The median of the repeats' ratios."""
        return statistics.median(self.ratios(ours, beside))

    def spread(self, ours: str, beside: str) -> tuple[float, float]:
        """Lower and upper quartile of the repeats' ratios."""
        ratios = self.ratios(ours, beside)
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return lower, upper

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])


def interleave(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], Any]], float] = wall_clock,
) -> Timing:
    """Time the sides in turns: A B C, B C A, C A B, ...

    `warmup` rounds are thrown away; give 0 where the parity check has already called every side. `clock` takes a side
    and returns its seconds; `lambda side: side()` lets sides return what they timed themselves.
    """
    for _ in range(warmup):
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(repeats):
        first = repeat % len(names)  # each round begins with another side, so that none always follows the same one
        for name in names[first:] + names[:first]:
            gc.collect()
            seconds[name].append(clock(sides[name]))
    return Timing(seconds)


# --------------------------------------------------------------------------------------------------------------- parity


class ParityError(AssertionError):
    """The sides do not compute the same, so there is nothing to time."""


def require(what: str, difference: float, at_most: float) -> str:
    """The words for `Row.parity`.

    Raises:
        ParityError: the difference is larger, or NaN.
    """
    if not difference <= at_most:
        raise ParityError(f"{what} differs by {difference:.1e}, allowed is {at_most:.0e}: not timed")
    return f"{what} {difference:.1e}"


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|, Euclidean norms in float64."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())


# --------------------------------------------------------------------------------------------------------------- memory


def peak_memory(target: str, *args: Any) -> int:
    """Bytes by which the resident memory of one call peaks above what was there before it, in a fresh process.

    `target` is "module:function"; `function(*args)` makes the inputs and returns the call to measure, which takes no
    arguments. `args` go through JSON. On a GPU use `torch.cuda.max_memory_allocated` instead.
    """
    command = [sys.executable, "-m", "benchmarks.measure", target, json.dumps(args)]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the memory of {target} with {args} failed ({done.returncode}): {last}")
    return int(done.stdout.split()[-1])


def _measure_here(target: str, args: list[Any]) -> int:
    module, function = target.split(":")
    call = getattr(importlib.import_module(module), function)(*args)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed while preparing would hide what the call takes
    before = _reset_peak()
    call()
    return max(0, _peak() - before)


def _reset_peak() -> int:
    """Resident bytes now; where the system allows, the peak starts from there."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # macOS, or not allowed: the peak so far
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    print(_measure_here(sys.argv[1], json.loads(sys.argv[2])))
