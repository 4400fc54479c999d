"""A teacher that reads its own prompts before the student's responses."""

from __future__ import annotations

from torch import Tensor

from topd.algorithm.transport import GroundCost
from topd.near_future.branches import Branches
from topd.near_future.shared_prefix import Prefill
from topd.near_future.windows import Places, Rollouts, Windows
from topd.teachers.protocol import Teacher


class PromptedTeacher:
    """Gives a teacher the rollouts as it reads them: behind its own prompts, where they have such. A `Teacher`.

    Positions count from the beginning of the response, so they are the same behind both prompts.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.scores, self.loss = teacher.scores, teacher.loss

    @property
    def cache_bytes_per_token(self) -> float:
        return self.teacher.cache_bytes_per_token

    def prefill(self, rollouts: Rollouts, keep_prefix: bool = True) -> Prefill:
        return self.teacher.prefill(rollouts.as_teacher_reads, keep_prefix)

    def continue_(self, places: Places, length: int, prefill: Prefill | None = None) -> Windows:
        return self.teacher.continue_(places.as_teacher_reads, length, prefill)

    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        return self.teacher.hidden_in_windows(rollouts.as_teacher_reads, branches)

    def window_costs(
        self, ours: Windows, theirs: Windows, places: Places, hidden: bool = False, cost: GroundCost = "cosine"
    ) -> Tensor:
        return self.teacher.window_costs(ours, theirs, places.as_teacher_reads, hidden, cost)
