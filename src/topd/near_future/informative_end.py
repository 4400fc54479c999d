"""End rollouts that have enough informative positions (Flash-OPD, 2610.06105): the rest teaches little for its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from topd.algorithm import top_k_overlap
from topd.near_future.distilled_model import DistilledModel
from topd.near_future.sampling import written_rollouts

TOP_K = 16
"""Most likely tokens that are compared (our choice)."""
OVERLAP = 0.7
"""A position is informative where the models share fewer of them."""
GROWTH = 1.5
"""How much longer rollouts are at each check, at least: all checks together read each token some three times."""


class InformativeEnd(StoppingCriteria):  # type: ignore[misc]
    """Stops `generate` once every rollout has `most` informative positions or has ended; then says where each is cut.

    Both models read the rollouts so far at a few lengths while they are sampled, and at the end. The cut does not
    depend on when they are read: it is behind the `most`-th informative position. Both models are in this process and
    share the tokenizer; `prompt_ids` are in the order of the rollouts.
    """

    def __init__(
        self, student: DistilledModel, teacher: DistilledModel, prompt_ids: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], most: int,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.tokenizer, self.most = student, teacher, tokenizer, most
        self.prompts = [torch.tensor(ids) for ids in prompt_ids]
        self.end_ids = torch.tensor(end_ids)
        self._prompt_width = 0
        self._next_check = most
        self._found: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._prompt_width = self._prompt_width or input_ids.shape[1] - 1
        responses = input_ids[:, self._prompt_width :]
        length = responses.shape[1]
        open_rows = torch.ones(len(responses), dtype=torch.bool, device=input_ids.device)
        if length < self._next_check:
            return ~open_rows
        ended = torch.isin(responses, self.end_ids.to(responses.device))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, length).tolist()
        so_far = [row[:n].tolist() for row, n in zip(responses, lengths, strict=True)]
        found = self._informative(so_far)
        missing = int((self.most - found.sum(1)).clamp(min=0).masked_fill(ended.any(1), 0).max())
        if missing == 0:
            self._found = found
            return open_rows
        self._next_check = max(length + missing, math.ceil(GROWTH * length))
        return ~open_rows

    def cut(self, responses: Sequence[list[int]]) -> list[list[int]]:
        """Each response up to its `most`-th informative position; whole where it has fewer."""
        found = self._informative(responses) if self._found is None else self._found  # of the check that stopped them
        reached = found.cumsum(1) >= self.most
        ends = torch.where(reached.any(1), reached.int().argmax(1) + 1, reached.shape[1]).tolist()
        return [response[:end] for response, end in zip(responses, ends, strict=True)]

    def _informative(self, responses: Sequence[list[int]]) -> Tensor:
        """[rollout, position] where the models share too few of their most likely tokens."""
        device = self.student.model.device
        rollouts = written_rollouts(self.prompts, [torch.tensor(ids) for ids in responses], self.tokenizer, device)
        mask = rollouts.response_mask.bool()
        ours, theirs = (model.hidden(rollouts)[mask] for model in (self.student, self.teacher))
        overlap = top_k_overlap(ours, self.student.head(), theirs, self.teacher.head(), TOP_K)
        return torch.zeros_like(mask).masked_scatter(mask, overlap < OVERLAP)


def stopping_by(model: Any, criterion: StoppingCriteria) -> AbstractContextManager[Any]:
    """Within it, `model.generate` also stops by this criterion; TRL's trainer passes none."""
    return patch.object(model, "generate", partial(model.generate, stopping_criteria=[criterion]))
