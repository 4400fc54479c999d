"""Several teachers as one: every rollout has its own (multi-teacher on-policy distillation, MOPD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from topd.algorithm import Head
from topd.errors import TOPDError
from topd.near_future.branches import Branches
from topd.near_future.distilled_model import DistilledModel
from topd.near_future.shared_prefix import Reading
from topd.near_future.ways import Ways
from topd.near_future.windows import Rollouts, Windows


@dataclass(frozen=True)
class Readings(Reading):
    """What each teacher kept from its rollouts; `hidden` is in the common columns."""

    of_teacher: tuple[Reading, ...] = ()


class RoutedTeacher(DistilledModel):
    """Asks, for each rollout, the teacher that `rollouts.teacher` names.

    The teachers' states lie side by side: a rollout's are in the columns of its teacher, with zeros in the others'; the
    output heads lie side by side likewise, so that one product gives each rollout the logits of its own teacher. That
    multiplies with all heads, and a state is as wide as all teachers together.

    Raises:
        TOPDError: the teachers' heads treat logits differently, or have other vocabularies.
    """

    def __init__(self, teachers: Sequence[DistilledModel]) -> None:
        self.teachers = tuple(teachers)
        heads = [teacher.head() for teacher in teachers]
        self._head = side_by_side(heads)
        self._widths = [head.weight.shape[1] for head in heads]

    @property
    def ways(self) -> Ways:
        raise TOPDError("Each of several teachers has its own ways: ask `teachers`.")

    @property
    def cache_bytes_per_token(self) -> float:
        return max(teacher.cache_bytes_per_token for teacher in self.teachers)

    def head(self) -> Head:
        return self._head

    @torch.no_grad()
    def hidden(self, rollouts: Rollouts) -> Tensor:
        """[rollout, position, all widths]"""
        return self._in_columns(rollouts, [teacher.hidden(rollouts[rows]) for teacher, rows in self._shares(rollouts)])

    @torch.no_grad()
    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        """[rollout, branch, window_position, all widths]"""
        parts = [teacher.hidden_in_windows(rollouts[rows], branches[rows]) for teacher, rows in self._shares(rollouts)]
        return self._in_columns(rollouts, parts)

    @torch.no_grad()
    def read(self, rollouts: Rollouts, keep_prefix: bool = True) -> Readings:
        parts = [teacher.read(rollouts[rows], keep_prefix) for teacher, rows in self._shares(rollouts)]
        return Readings(self._in_columns(rollouts, [part.hidden for part in parts]), of_teacher=tuple(parts))

    @torch.no_grad()
    def continue_(
        self,
        rollouts: Rollouts,
        reading: Reading,
        greedy: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        from_candidate: bool = False,
    ) -> Windows:
        assert isinstance(reading, Readings)
        tokens = torch.zeros(len(rows), length, dtype=torch.long, device=rows.device)
        mask = torch.zeros(len(rows), length, dtype=torch.bool, device=rows.device)
        for (teacher, mine), part in zip(self._shares(rollouts), reading.of_teacher, strict=True):
            here = torch.isin(rows, mine)
            windows = teacher.continue_(
                rollouts[mine], part, greedy[mine], torch.searchsorted(mine, rows[here]), positions[here], length,
                from_candidate,
            )  # fmt: skip
            tokens[here], mask[here] = windows.tokens, windows.mask
        return Windows(tokens, mask)

    def _shares(self, rollouts: Rollouts) -> Iterator[tuple[DistilledModel, Tensor]]:
        """Each teacher that has rollouts, and their rows."""
        assert rollouts.teacher is not None
        for number, teacher in enumerate(self.teachers):
            rows = (rollouts.teacher == number).nonzero().squeeze(-1)
            if len(rows):
                yield teacher, rows

    def _in_columns(self, rollouts: Rollouts, parts: Sequence[Tensor]) -> Tensor:
        """States of each share, put in its rows and its teacher's columns."""
        out = parts[0].new_zeros(len(rollouts), *parts[0].shape[1:-1], sum(self._widths))
        for (teacher, rows), part in zip(self._shares(rollouts), parts, strict=True):
            first = sum(self._widths[: self.teachers.index(teacher)])
            out[rows, ..., first : first + part.shape[-1]] = part.to(out.dtype)
        return out


def side_by_side(heads: Sequence[Head]) -> Head:
    """One head for states that lie side by side."""
    alike = {(head.scale, head.softcap, head.temperature, head.bias is None) for head in heads}
    if len(alike) > 1 or heads[0].bias is not None:
        raise TOPDError("Several teachers must treat logits alike: no bias, the same scale and soft cap.")
    if len({head.weight.shape[0] for head in heads}) > 1:
        raise TOPDError("Several teachers must have output heads of the same vocabulary.")
    return replace(heads[0], weight=torch.cat([head.weight.detach() for head in heads], dim=1))
