"""Embed both windows and move one onto the other: from tokens to costs to plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from topd.algorithm import Transport, entropic_transport, exact_transport, ground_cost, token_cost
from topd.algorithm.transport import GroundCost
from topd.near_future.distilled_model import DistilledModel
from topd.near_future.windows import Rollouts, Windows, comparable

if TYPE_CHECKING:
    from topd.teachers.top_k import RemoteTeacher

Embedding = Literal["student", "teacher", "student_hidden", "teacher_hidden"]
"""Static input embeddings of a model, or its last hidden states over the windows."""
Solver = Literal["exact", "entropic"]
"""`exact_transport` or `entropic_transport`."""


def near_future_transport(
    ours: Windows,
    theirs: Windows,
    rollouts: Rollouts,
    rows: Tensor,
    positions: Tensor,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    *,
    embedding: Embedding = "student",
    cost: GroundCost = "cosine",
    solver: Solver = "exact",
    epsilon: float = 0.05,
) -> Transport:
    """Transport between the student's windows (rows) and the teacher's (columns). See `TOPDConfig` for the choices.

    Windows that EOS ended are compared as if EOS were repeated up to K, see `comparable`.

    Args:
        ours: the student's windows, which start at (row, position) of the rollouts.
        theirs: the teacher's, at the same places.
        rollouts: that they branch off.
        rows: [window] the rollout of each.
        positions: [window] the response position at which it starts.
        student: whose embeddings or states the cost may be measured on.
        teacher: the same.
        embedding: which of them; the student's input embeddings by default (our choice).
        cost: ground cost (our choice).
        solver: exact (one-hot targets) or entropic (soft targets); our choice.
        epsilon: of the entropic solver, in units of the window's mean cost.
    """
    model = student if embedding.startswith("student") else teacher
    a, b = comparable(ours, theirs, student.eos_token_ids)
    if embedding.endswith("_hidden"):
        prefixes = rollouts.prefixes(rows, positions)
        states = [_states(model, prefixes, windows) for windows in (ours, theirs)]
        costs = ground_cost(states[0], states[1], cost)
    else:
        costs = token_cost(a.tokens, b.tokens, model.embeddings(), cost)
    if solver == "entropic":
        return entropic_transport(costs, a.mask, b.mask, epsilon=epsilon)
    return exact_transport(costs, a.mask, b.mask)


def _states(model: DistilledModel | RemoteTeacher, prefixes: list[Tensor], windows: Windows) -> Tensor:
    """[window, window_position, width] last hidden states; behind a window's end, the state of its end."""
    states = model.states_of(prefixes, windows).float()
    last = (windows.mask.sum(1) - 1).clamp(min=0)
    index = torch.minimum(torch.arange(states.shape[1], device=states.device), last[:, None])
    return states.gather(1, index[:, :, None].expand_as(states))
