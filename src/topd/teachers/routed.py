"""Several teachers as one: every rollout has its own (multi-teacher on-policy distillation, MOPD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from topd.algorithm import Head
from topd.algorithm.transport import GroundCost
from topd.errors import TOPDError
from topd.near_future.distilled_model import DistilledModel, FullVocabulary
from topd.near_future.windows import Branches, Places, Prefill, Rollouts, Windows


class RoutedTeacher(FullVocabulary):
    """Asks, for each rollout, the teacher that `rollouts.teacher` names. A `Teacher`.

    The teachers' states lie side by side: a rollout's are in the columns of its teacher, with zeros in the others'; the
    output heads lie side by side likewise, so that one product gives each rollout the logits of its own teacher. That
    multiplies with all heads, and a state is as wide as all teachers together. Raises `TOPDError` if the teachers'
    heads treat logits differently, or have other vocabularies.
    """

    def __init__(self, teachers: Sequence[DistilledModel]) -> None:
        self.teachers = tuple(teachers)
        heads = [teacher.head() for teacher in teachers]
        alike = {(head.scale, head.softcap, head.temperature, head.bias is None) for head in heads}
        if len(alike) > 1 or heads[0].bias is not None:
            raise TOPDError("Several teachers must treat logits alike: no bias, the same scale and soft cap.")
        if len({head.weight.shape[0] for head in heads}) > 1:
            raise TOPDError("Several teachers must have output heads of the same vocabulary.")
        self._head = replace(heads[0], weight=torch.cat([head.weight.detach() for head in heads], dim=1))
        self._widths = [head.weight.shape[1] for head in heads]

    @property
    def cache_bytes_per_token(self) -> float:
        return max(teacher.cache_bytes_per_token for teacher in self.teachers)

    def head(self) -> Head:
        """All output heads side by side."""
        return self._head

    @torch.no_grad()
    def prefill(self, rollouts: Rollouts, keep_prefix: bool = True) -> Prefill:
        parts = [teacher.prefill(rollouts[rows], keep_prefix) for teacher, rows in self._shares(rollouts)]
        states = {"hidden": self._in_columns(rollouts, [part.hidden for part in parts])}
        return Prefill(states, parts=tuple(parts))

    @torch.no_grad()
    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        parts = [teacher.hidden_in_windows(rollouts[rows], branches[rows]) for teacher, rows in self._shares(rollouts)]
        return self._in_columns(rollouts, parts)

    @torch.no_grad()
    def continue_(self, places: Places, length: int, prefill: Prefill | None = None) -> Windows:
        tokens = torch.zeros(len(places), length, dtype=torch.long, device=places.rows.device)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for number, (teacher, rows) in enumerate(self._shares(places.rollouts)):
            part, which = places.of_rollouts(rows)
            kept = None
            if prefill is not None:
                greedy = None if prefill.greedy is None else prefill.greedy[rows]
                kept = replace(prefill.parts[number], greedy=greedy)
            windows = teacher.continue_(part, length, kept)
            tokens[which], mask[which] = windows.tokens, windows.mask
        return Windows(tokens, mask)

    @torch.no_grad()
    def window_costs(
        self, ours: Windows, theirs: Windows, places: Places, hidden: bool = False, cost: GroundCost = "cosine"
    ) -> Tensor:
        """By each place's own teacher."""
        costs = torch.zeros(*ours.tokens.shape, theirs.tokens.shape[1], device=places.rows.device)
        for teacher, rows in self._shares(places.rollouts):
            part, which = places.of_rollouts(rows)
            costs[which] = teacher.window_costs(ours[which], theirs[which], part, hidden, cost).to(costs.dtype)
        return costs

    def _shares(self, rollouts: Rollouts) -> Iterator[tuple[DistilledModel, Tensor]]:
        """Each teacher that has rollouts, and their rows."""
        assert rollouts.teacher is not None
        for number, teacher in enumerate(self.teachers):
            rows = (rollouts.teacher == number).nonzero().squeeze(-1)
            if len(rows):
                yield teacher, rows

    def _in_columns(self, rollouts: Rollouts, parts: Sequence[Tensor]) -> Tensor:
        """States of each share, put in its rows and its teacher's columns, in a dtype that rounds none of them."""
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        out = parts[0].new_zeros(len(rollouts), *parts[0].shape[1:-1], sum(self._widths), dtype=dtype)
        for (teacher, rows), part in zip(self._shares(rollouts), parts, strict=True):
            first = sum(self._widths[: self.teachers.index(teacher)])
            out[rows, ..., first : first + part.shape[-1]] = part.to(dtype)
        return out
