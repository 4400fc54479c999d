"""Transport of 50 x 50 windows: from tokens to distances, building the ground cost included, float32 embeddings.

Windows are drawn from a table of 8192 tokens x 256, some tokens frequent, as text repeats tokens; half of a student's
window are the teacher's tokens one place later. All sides use the cosine cost. Sides:

- ours: `topd.algorithm.token_cost`, then `exact_transport`: the whole batch, distances and plans.
- POT loop: for each pair the cost of its 50 + 50 embeddings, then `ot.emd2` in float64 (exact, network simplex).
- scipy loop: the same cost, then `linear_sum_assignment` (exact, since lengths are equal).
- ot.solve_batch: the batch's costs by one batched product, then 50 entropic iterations at epsilon 0.05.
- geomloss: `SamplesLoss("sinkhorn", p=2, blur=0.05 ** 0.5, debias=False)` on the normalised embeddings, whose cost,
  |x - y|^2 / 2, is the cosine cost.

The exact sides must agree within 1e-6 in every distance before anything is timed; how far the entropic sides are from
exact is in their rows, and they are informative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import Size
from benchmarks.environment import installed, say
from benchmarks.measure import interleave, require
from benchmarks.row import Row, missing_row, time_row
from topd.algorithm import exact_transport, token_cost

LENGTH, EPSILON, ITERATIONS = 50, 0.05, 50
GATE, TOLERANCE = 0.25, 1e-6
WHAT = f"{LENGTH} x {LENGTH} windows, from tokens to transport distances, cost included"
VOCABULARY, WIDTH = 8192, 256
BATCHES: dict[Size, tuple[int, ...]] = {"tiny": (8,), "quick": (64, 512), "full": (64, 512, 4096)}
REPEATS: dict[Size, int] = {"tiny": 1, "quick": 3, "full": 7}


class Pairs(NamedTuple):
    """Tokens [window, position] of students and teachers, and the table they index."""

    student: Tensor
    teacher: Tensor
    table: Tensor


def random_pairs(windows: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, VOCABULARY + 1)
    drawn = torch.multinomial(frequency.expand(2 * windows, -1), LENGTH, replacement=True, generator=generator)
    student, teacher = drawn[:windows], drawn[windows:]
    copied = torch.rand(student.shape, generator=generator) < 0.5
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return Pairs(torch.where(copied, teacher.roll(1, 1), student), teacher, table)


def ours(pairs: Pairs) -> numpy.ndarray:
    mask = torch.ones(pairs.student.shape, dtype=torch.bool)
    return exact_transport(token_cost(*pairs), mask, mask).distance.double().numpy()


def pair_cost(student: Tensor, teacher: Tensor, table: Tensor) -> numpy.ndarray:
    """Of one window pair, as a solver on the CPU wants it."""
    cost = 1 - normalize(table[student], dim=-1) @ normalize(table[teacher], dim=-1).T
    return cost.clamp_(min=0).masked_fill_(student[:, None] == teacher, 0).double().numpy()


def pot_loop(pairs: Pairs) -> numpy.ndarray:
    import ot

    uniform = numpy.full(LENGTH, 1 / LENGTH)
    costs = (pair_cost(a, b, pairs.table) for a, b in zip(pairs.student, pairs.teacher, strict=True))
    return numpy.array([ot.emd2(uniform, uniform, cost) for cost in costs])


def scipy_loop(pairs: Pairs) -> numpy.ndarray:
    costs = (pair_cost(a, b, pairs.table) for a, b in zip(pairs.student, pairs.teacher, strict=True))
    return numpy.array([cost[linear_sum_assignment(cost)].mean() for cost in costs])


def pot_batch(pairs: Pairs) -> numpy.ndarray:
    import ot

    student, teacher = (normalize(pairs.table[tokens], dim=-1) for tokens in pairs[:2])
    cost = (1 - student @ teacher.mT).clamp_(min=0)
    cost.masked_fill_(pairs.student[:, :, None] == pairs.teacher[:, None], 0)
    return ot.solve_batch(cost, reg=EPSILON, max_iter=ITERATIONS, grad="detach").value_linear.numpy()


def geomloss_batch(pairs: Pairs) -> numpy.ndarray:
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=EPSILON**0.5, debias=False, backend="tensorized")
    student, teacher = (normalize(pairs.table[tokens], dim=-1) for tokens in pairs[:2])
    return loss(student, teacher).numpy()


EXACT: dict[str, Callable[[Pairs], numpy.ndarray]] = {"ours": ours, "POT loop": pot_loop, "scipy loop": scipy_loop}
ENTROPIC: dict[str, Callable[[Pairs], numpy.ndarray]] = {"ot.solve_batch": pot_batch, "geomloss": geomloss_batch}


def rows(size: Size) -> Iterable[Row]:
    entropic = dict(ENTROPIC)
    if not installed("geomloss"):
        del entropic["geomloss"]
        yield missing_row("transport", "geomloss", "--no-deps geomloss==0.3.1", what=WHAT)
    for windows in BATCHES[size]:
        say(f"transport: {windows} windows")
        yield from _batch(windows, EXACT | entropic, REPEATS[size])


def _batch(windows: int, sides: dict[str, Callable[[Pairs], numpy.ndarray]], repeats: int) -> Iterator[Row]:
    pairs = random_pairs(windows)
    found = {side: solve(pairs) for side, solve in sides.items()}
    gap = {side: numpy.abs(found[side] - found["POT loop"]).max() for side in found}
    parity = {side: require(f"{side}: distance", gap[side], TOLERANCE) for side in EXACT}
    calls = {side: lambda solve=solve: solve(pairs) for side, solve in sides.items()}
    timing = interleave(calls, repeats, warmup=0)  # the parity check called each once
    for side in list(sides)[1:]:
        note = None
        if side in ENTROPIC:
            bias = float((found[side] - found["POT loop"]).mean())
            value = "its value, entropy term included," if side == "geomloss" else "its distance"
            note = f"entropic, not exact: {value} is {bias:+.4f} off in the mean, {gap[side]:.4f} at most"
        yield time_row(
            "transport", side, timing, size=f"{windows} windows", what=WHAT, note=note, parity=parity["ours"],
            gate=GATE if side == "POT loop" else None,
        )  # fmt: skip
