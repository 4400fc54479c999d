"""What a step asks of its teacher, wherever the teacher is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from topd.algorithm import DistillationLoss, Head, LikelihoodTerms, TokenScores
from topd.algorithm.transport import GroundCost
from topd.algorithm.vocabulary import Direction
from topd.near_future.branches import Branches, Prefill
from topd.near_future.windows import Places, Rollouts, Windows


class Teacher(Protocol):
    """A model in this process (`DistilledModel`), one behind a server (`TopKTeacher`), or several (`RoutedTeacher`).

    It is given rollouts and places as it reads them, see `Rollouts.as_teacher_reads`. Where it cannot do what is asked
    (a server has no hidden states), it raises `TOPDError` and names an option that works.
    """

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes that a kept prefix takes per token; 0 where none is kept."""

    def prefill(self, rollouts: Rollouts, keep_prefix: bool = True) -> Prefill:
        """Read rollouts. `Prefill.states` is batch-first, so that it can travel with the batch to the loss."""

    def scores(
        self, hidden: Tensor, head: Head, states: Mapping[str, Tensor], tokens: Tensor, direction: Direction = "reverse"
    ) -> TokenScores:
        """Token losses without gradients, in nats.

        `hidden`: [token, width] the student's states that predict the tokens. `head`: the student's. `states`: the
        teacher's `Prefill.states` at the same tokens. `tokens`: [token] the sampled ones. `direction`: reverse,
        KL(student || teacher), or forward, KL(teacher || student).
        """

    def loss(
        self, hidden: Tensor, head: Head, states: Mapping[str, Tensor], weights: Tensor,
        terms: LikelihoodTerms | None = None, direction: Direction = "reverse",
    ) -> DistillationLoss:  # fmt: skip
        """`distillation_loss` against this teacher, in nats; differentiable in the student.

        `hidden`: [row, width]; its first rows meet the teacher. `states`, and the `weights` [token] of the token
        losses, are those of these rows. `terms`: of the trajectory loss. The rest is as in `scores`.
        """

    def continue_(self, places: Places, length: int, prefill: Prefill | None = None) -> Windows:
        """The teacher's greedy continuation of the student's prefix at each place, at most `length` tokens."""

    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        """[rollout, branch, window_position, width] the states that predict the windows' tokens, no gradient."""

    def window_costs(
        self, ours: Windows, theirs: Windows, places: Places, hidden: bool = False, cost: GroundCost = "cosine"
    ) -> Tensor:
        """Ground costs by this teacher's embeddings or hidden states. See `DistilledModel.window_costs`."""
