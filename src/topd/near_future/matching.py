"""Embed both windows and move one onto the other: from tokens to costs to plans."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from topd.algorithm import Transport, entropic_transport, exact_transport, ground_cost, token_cost
from topd.algorithm.transport import GroundCost
from topd.near_future.distilled_model import DistilledModel
from topd.near_future.remote_teacher import RemoteTeacher
from topd.near_future.windows import Rollouts, Windows

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
        solver: our choice.
        epsilon: of the entropic solver.
    """
    model = student if embedding.startswith("student") else teacher
    if embedding.endswith("_hidden"):
        prefixes = rollouts.prefixes(rows, positions)
        costs = ground_cost(model.states_of(prefixes, ours).float(), model.states_of(prefixes, theirs).float(), cost)
    else:
        costs = token_cost(ours.tokens, theirs.tokens, model.embeddings(), cost)
    if solver == "entropic":
        return entropic_transport(costs, ours.mask, theirs.mask, epsilon=epsilon)
    return exact_transport(costs, ours.mask, theirs.mask)
