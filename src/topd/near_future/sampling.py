"""Rollouts outside a trainer: sample the student on prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.near_future.distilled_model import DistilledModel, fixed
from topd.near_future.local_model import LocalModel
from topd.near_future.windows import Rollouts


def sample_rollouts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollouts:
    """One response to each prompt, sampled from the full distribution."""
    ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    source = LocalModel(model, tokenizer.pad_token_id, [tokenizer.eos_token_id], temperature)
    responses = source.continue_(ids, max_new_tokens)
    longest = max(len(prompt) for prompt in ids)

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])

    mask = responses.mask.long()
    return Rollouts(
        padded(ids, tokenizer.pad_token_id).to(mask.device),
        padded([torch.ones_like(row) for row in ids], 0).to(mask.device),
        responses.tokens,
        mask,
        mask,
    )


def local_pair(
    student: Any, teacher: Any, tokenizer: PreTrainedTokenizerBase, micro_batch: int = 32
) -> tuple[DistilledModel, DistilledModel]:
    """Both models as the analyses see them: in this process, greedy windows."""

    def distilled(model: Any) -> DistilledModel:
        source = LocalModel(model, tokenizer.pad_token_id, [tokenizer.eos_token_id])
        return DistilledModel(model, fixed(source), micro_batch=micro_batch)

    return distilled(student), distilled(teacher)
