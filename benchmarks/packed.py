"""Guidance: the student over a rollout and its windows in one row, forward and backward.

Timed is the backbone over [rollout | windows] (`branches.packed`), with the gradient of all of its parameters; the
windows add half as many tokens as the rollout has. Sides:

- the rollout alone: the same model over the rollout, forward and backward. This one carries the gate.
- separate sequences: the rollout, and every window behind its own copy of the prefix (`branches.separate`).

Parity: the gradients of packed and separate sequences, to 1e-5 relative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import interleave, relative_difference, require
from benchmarks.models import random_model
from benchmarks.row import Row, time_row
from topd.near_future import Branches, Rollouts
from topd.near_future.branches import packed, rollout_hidden, separate
from topd.near_future.model_parts import backbone_of

WHAT = "forward and backward of the student over a rollout and its windows"
ALONE, SEPARATE = "the rollout alone", "separate sequences"
GATE = 2.2


class Plan(NamedTuple):
    rollout: int
    windows: int
    length: int
    repeats: int


SIZES: dict[Size, list[Plan]] = {
    "tiny": [Plan(32, 2, 8, 1)],
    "quick": [Plan(1024, 16, 32, 2)],
    "full": [Plan(1024, 16, 32, 7), Plan(4096, 41, 50, 3)],
}


def rows(size: Size) -> Iterable[Row]:
    for plan in SIZES[size]:
        say(f"packed: rollout {plan.rollout}, {plan.windows} windows of {plan.length}")
        yield from _compare(plan)


def _compare(plan: Plan) -> Iterable[Row]:
    model = random_model(512, width=256, layers=6, seed=0, scale=1.0, positions=2 * plan.rollout).train()
    backbone = backbone_of(model)
    torch.manual_seed(1)
    prompt, response = torch.randint(3, 512, (1, 16)), torch.randint(3, 512, (1, plan.rollout - 16))
    ones = torch.ones_like(response)
    rollouts = Rollouts(prompt, torch.ones_like(prompt), response, ones, ones)
    positions = torch.randperm(response.shape[1] // 2)[: plan.windows] + response.shape[1] // 2
    tokens = torch.randint(3, 512, (1, plan.windows, plan.length))
    branches = Branches(positions.sort().values[None], tokens, torch.ones_like(tokens, dtype=torch.bool))
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: _gradient(model, packed(backbone, rollouts, branches)),
        SEPARATE: lambda: _gradient(model, separate(backbone, rollouts, branches)),
        ALONE: lambda: _gradient(model, (rollout_hidden(backbone, rollouts),)),
    }
    if plan.rollout > 1024:  # copies of a long prefix for every window do not fit in memory
        del sides[SEPARATE]
        parity = "checked at 1024"
    else:
        parity = require("gradient", relative_difference(sides["ours"](), sides[SEPARATE]()), 1e-5)
    timing = interleave(sides, plan.repeats)
    at = f"rollout {plan.rollout}, {plan.windows} x {plan.length}"
    for beside in list(sides)[1:]:
        gate = GATE if beside == ALONE else None
        yield time_row("packed", beside, timing, size=at, what=WHAT, gate=gate, parity=parity)


def _gradient(model: Any, states: tuple[Tensor, ...]) -> Tensor:
    model.zero_grad(set_to_none=True)
    sum(part.square().mean() for part in states).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None])
