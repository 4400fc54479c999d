"""From both windows at each place to ground costs, and from costs to the transport plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from topd.algorithm import Transport, entropic_transport, exact_transport
from topd.algorithm.transport import GroundCost
from topd.near_future.distilled_model import DistilledModel
from topd.near_future.windows import Places, Windows, comparable

if TYPE_CHECKING:
    from topd.teachers.protocol import Teacher

Embedding = Literal["student", "teacher", "student_hidden", "teacher_hidden"]
"""Static input embeddings of a model, or its last hidden states over the windows."""
Solver = Literal["exact", "entropic"]
"""`exact_transport` or `entropic_transport`."""


def near_future_transport(
    ours: Windows,
    theirs: Windows,
    places: Places,
    student: DistilledModel,
    teacher: DistilledModel | Teacher,
    *,
    embedding: Embedding = "student",
    cost: GroundCost = "cosine",
    solver: Solver = "exact",
    epsilon: float = 0.05,
) -> Transport:
    """Transport between the student's windows (rows) and the teacher's (columns) at the same places.

    Windows that EOS ended are compared as if EOS were repeated up to K, see `comparable`. Embedding (the student's
    static ones by default), cost and solver are our choice, see `TOPDConfig`. `epsilon`: of the entropic solver, in
    units of the window's mean cost.
    """
    model: DistilledModel | Teacher = student
    if embedding.startswith("teacher"):
        model, places = teacher, places.as_teacher_reads
    hidden = embedding.endswith("_hidden")
    a, b = comparable(ours, theirs, student.eos_token_ids)
    costs = model.window_costs(ours, theirs, places, hidden=True, cost=cost) if hidden else (
        model.window_costs(a, b, places, cost=cost)
    )  # fmt: skip
    if solver == "entropic":
        return entropic_transport(costs, a.mask, b.mask, epsilon=epsilon)
    return exact_transport(costs, a.mask, b.mask)
