"""Rollouts outside a trainer: sample the student on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.near_future.distilled_model import DistilledModel
from topd.near_future.generation import end_token_ids, padding_id
from topd.near_future.local_model import LocalModel
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
    return _rollouts(ids, responses.tokens, responses.mask, pad)


def written_rollouts(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Rollouts:
    """Rollouts that are there already, from token ids."""
    longest, fill = max(len(response) for response in responses), padding_id(tokenizer)
    pad = torch.nn.functional.pad
    tokens = torch.stack([pad(r, (0, longest - len(r)), value=fill) for r in responses])
    mask = torch.stack([pad(torch.ones_like(r), (0, longest - len(r))) for r in responses]).bool()
    return _rollouts(prompts, tokens.to(device), mask.to(device), fill)


def _rollouts(prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor, pad_token_id: int) -> Rollouts:
    longest = max(len(prompt) for prompt in prompts)

    def padded(rows: list[Tensor], value: int) -> Tensor:
        padded = [torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows]
        return torch.stack(padded).to(tokens.device)

    return Rollouts(
        padded(list(prompts), pad_token_id),
        padded([torch.ones_like(row) for row in prompts], 0),
        tokens,
        mask.long(),
        mask.long(),
    )


def local_pair(
    student: Any, teacher: Any, tokenizer: PreTrainedTokenizerBase, micro_batch: int = 32
) -> tuple[DistilledModel, DistilledModel]:
    """Both models as the analyses see them: in this process, greedy windows that the student's end tokens end."""
    ends = end_token_ids(student.generation_config, tokenizer)

    def distilled(model: Any) -> DistilledModel:
        source = LocalModel(model, padding_id(tokenizer), ends)
        return DistilledModel(model, source, micro_batch=micro_batch)

    return distilled(student), distilled(teacher)
