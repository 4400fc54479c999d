"""How TOPD grows: seconds and peak memory at 1, 2, 4, 8 x rollout length, and at 1, 2, 4, 8 x candidates.

Timed is what follows the sampling of two rollouts: scoring, windows of 16 tokens (regenerated: both models decode),
transport, loss, backward, with the models of the case "step". `ratio` is (8 x the work) / (8 x what 1 x takes), so
linear growth is 1; all four points are in `note`. Attention apart: over length its cost grows with the square, so
seconds are set beside a scoring forward's own growth over the same lengths. Peak memory is that of a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import interleave, peak_memory
from benchmarks.models import random_model
from benchmarks.row import Row
from benchmarks.step import PROMPT, VOCABULARY, Pair, Plan
from topd.near_future import Rollouts

TIMES = (1, 2, 4, 8)
LINEAR = 1.15
WHAT = "scoring, windows, transport, loss, backward of two rollouts; 1 is linear growth"
WINDOW = 16

SIZES: dict[Size, tuple[int, int, int]] = {"tiny": (16, 1, 1), "quick": (128, 3, 1), "full": (256, 4, 5)}
"""Shortest rollout, fewest candidates a rollout, repeats."""


def rows(size: Size) -> Iterable[Row]:
    length, candidates, repeats = SIZES[size]
    say("growth: over length")
    lengths = [length * times for times in TIMES]
    calls = {f"{each}": learning(each, candidates) for each in lengths}
    forwards = {f"forward {each}": forward(each) for each in lengths}
    timing = interleave(calls | forwards, repeats)
    size_words = f"{length} to {lengths[-1]} tokens, {candidates} candidates"
    ours = [timing.median(name) for name in calls]
    apart = [timing.median(name) for name in forwards]
    yield _time(size_words, "a scoring forward's growth", ours, apart[-1] / apart[0])
    yield _memory(size_words, {times: (each, candidates) for times, each in zip(TIMES, lengths, strict=True)}, size)

    say("growth: over candidates")
    longest, counts = lengths[-2], [candidates * times for times in TIMES]
    timing = interleave({f"{each}": learning(longest, each) for each in counts}, repeats)
    size_words = f"{counts[0]} to {counts[-1]} candidates, {longest} tokens"
    ours = [timing.median(f"{each}") for each in counts]
    yield _time(size_words, "linear", ours, TIMES[-1])
    yield _memory(size_words, {times: (longest, each) for times, each in zip(TIMES, counts, strict=True)}, size)


def learning(length: int, candidates: int) -> Callable[[], object]:
    """Inputs for, and the call of, the learning part."""
    pair = Pair(Plan(2, length, WINDOW, 1, 0))
    options = pair.config("regenerated")
    options.candidate_share = candidates / length
    rollouts = random_rollouts(length)
    return lambda: pair.topd(rollouts, None, options)


def random_rollouts(length: int) -> Rollouts:
    torch.manual_seed(3)
    prompt, response = torch.randint(3, VOCABULARY, (2, PROMPT)), torch.randint(3, VOCABULARY, (2, length))
    ones = torch.ones_like(response)
    return Rollouts(prompt, torch.ones_like(prompt), response, ones, ones)


def forward(length: int) -> Callable[[], object]:
    model = random_model(VOCABULARY, width=256, layers=6, seed=0, positions=2 * length).eval()
    ids = random_rollouts(length).input_ids

    def call() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return call


def _memory(words: str, points: dict[int, tuple[int, int]], size: Size) -> Row:
    """`points`: length and candidates, by how many times the work."""
    measured = points if size == "full" else {times: points[times] for times in (TIMES[0], TIMES[-1])}
    peaks = {times: float(peak_memory("benchmarks.growth:learning", *point)) for times, point in measured.items()}
    note = ", ".join(f"{times} x: {peak / 2**20:.0f} MB" for times, peak in peaks.items())
    sides = {"ours": peaks[TIMES[-1]], "beside": TIMES[-1] * peaks[TIMES[0]]}
    return _row("linear", words, "peak memory", sides["ours"] / sides["beside"], note, bytes=sides)


def _time(size: str, beside: str, seconds: list[float], growth: float) -> Row:
    """`growth`: of the other side, from 1 x to 8 x."""
    note = ", ".join(f"{times} x: {each:.2f} s" for times, each in zip(TIMES, seconds, strict=True))
    sides = {"ours": seconds[-1], "beside": growth * seconds[0]}
    return _row(beside, size, "time", seconds[-1] / (growth * seconds[0]), note, seconds=sides)


def _row(beside: str, size: str, measure: str, ratio: float, note: str, **sides: dict[str, float]) -> Row:
    return Row("growth", beside, measure, size=size, what=WHAT, ratio=ratio, gate=LINEAR, note=note, **sides)  # type: ignore[arg-type]
