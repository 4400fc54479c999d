"""Rollouts outside a trainer: sample the student on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from topd.near_future.distilled_model import DistilledModel
from topd.near_future.generation import end_token_ids, padding_id
from topd.near_future.local_model import LocalModel
from topd.near_future.padding import left_padded
from topd.near_future.windows import Rollouts


def sample_rollouts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollouts:
    """One response to each prompt (text, or token ids), sampled from the full distribution."""
    ids = [torch.tensor(tokenizer(p)["input_ids"]) if isinstance(p, str) else p for p in prompts]
    pad = padding_id(tokenizer)
    source = LocalModel(model, pad, end_token_ids(model.generation_config, tokenizer), temperature)
    responses = source.continue_(ids, max_new_tokens)
    return _rollouts(ids, responses.tokens, responses.mask.long(), pad)


def written_rollouts(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Rollouts:
    """Rollouts that are there already, from token ids."""
    pad = padding_id(tokenizer)
    tokens = pad_sequence(list(responses), batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(response) for response in responses], batch_first=True)
    return _rollouts(prompts, tokens.to(device), mask.to(device), pad)


def _rollouts(prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor, pad_token_id: int) -> Rollouts:
    prompt_ids, prompt_mask = (part.to(tokens.device) for part in left_padded(prompts, pad_token_id))
    return Rollouts(prompt_ids, prompt_mask, tokens, mask, mask)


def local_pair(
    student: Any, teacher: Any, tokenizer: PreTrainedTokenizerBase, micro_batch: int = 32
) -> tuple[DistilledModel, DistilledModel]:
    """Both models as the analyses see them: in this process, greedy windows that the student's end tokens end."""
    ends = end_token_ids(student.generation_config, tokenizer)

    def distilled(model: Any) -> DistilledModel:
        source = LocalModel(model, padding_id(tokenizer), ends)
        return DistilledModel(model, source, micro_batch=micro_batch)

    return distilled(student), distilled(teacher)
