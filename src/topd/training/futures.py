"""Embed both windows and move one onto the other: between near_future (tokens) and algorithm (costs, plans)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from topd.algorithm import Transport, entropic_transport, exact_transport, ground_cost, token_cost
from topd.near_future import Windows

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig
    from topd.training.models import DistilledModel


def near_future_transport(
    ours: Windows,
    theirs: Windows,
    prefixes: list[Tensor],
    student: DistilledModel,
    teacher: DistilledModel,
    options: TOPDConfig,
) -> Transport:
    """Transport between the student's and the teacher's windows, under the options' embedding, cost and solver."""
    model = student if options.embedding.startswith("student") else teacher
    if options.embedding.endswith("_hidden"):
        cost = ground_cost(
            model.states_of(prefixes, ours).float(), model.states_of(prefixes, theirs).float(), options.ground_cost
        )
    else:
        cost = token_cost(ours.tokens, theirs.tokens, model.embeddings(), options.ground_cost)
    if options.transport_solver == "entropic":
        return entropic_transport(cost, ours.mask, theirs.mask, epsilon=options.entropic_epsilon)
    return exact_transport(cost, ours.mask, theirs.mask)
