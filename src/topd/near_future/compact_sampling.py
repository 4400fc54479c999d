"""Sample in batches that get smaller: rollouts that have ended leave, instead of being padded to the longest.

`generate` decodes every row until the last one ends. Where lengths differ by a factor of two or three, as in worked
solutions, half of its work is padding. Here it stops whenever half of its rows have ended, and continues the others
over their part of the cache. Each row's distribution is the same; the random numbers are not those of one call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from topd.near_future.sampling_states import SamplingStates


class HalfHaveEnded(StoppingCriteria):
    """Stops all rows once at most half of them are without an end token behind `start`."""

    def __init__(self, start: int, ends: Tensor) -> None:
        self.start, self.ends = start, ends

    def ended(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids[:, self.start :], self.ends).any(-1)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        left = len(input_ids) - int(self.ended(input_ids).sum())
        return torch.full_like(input_ids[:, 0], left <= len(input_ids) // 2, dtype=torch.bool)


@contextmanager
def compact_sampling(model: Any, states: SamplingStates | None = None) -> Iterator[None]:
    """In this block `model.generate` drops rows that have ended.

    Args:
        model: that TRL calls `generate` of, with `input_ids`, `attention_mask` and `generation_config`.
        states: that keeps the hidden states of the sampling, if any.
    """
    followers = [] if states is None else [states]
    with patch.object(model, "generate", partial(generate_compactly, model.generate, followers)):
        yield


def generate_compactly(
    generate: Any, followers: Sequence[Any], *, input_ids: Tensor, attention_mask: Tensor,
    generation_config: GenerationConfig, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The sequences that `generate` returns: [row, token], padded on the right.

    Args:
        followers: objects whose attribute `rows` is set to the rows that are left.
    """
    start, longest = input_ids.shape[1], generation_config.max_new_tokens
    ends = torch.as_tensor(generation_config.eos_token_id, device=input_ids.device).flatten()
    rows = torch.arange(len(input_ids), device=input_ids.device)
    sequences = input_ids.new_full((len(rows), start + longest), generation_config.pad_token_id)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    while len(rows):
        stop = HalfHaveEnded(start, ends)
        config = copy.copy(generation_config)
        config.max_new_tokens = start + longest - inputs["input_ids"].shape[1]
        config.return_dict_in_generate = True
        for follower in followers:
            follower.rows = rows
        found = generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList([stop]), **kwargs)
        width = found.sequences.shape[1]
        sequences[rows, :width] = found.sequences
        kept = (~stop.ended(found.sequences)).nonzero().squeeze(-1)
        if width == start + longest or len(kept) == 0:
            break
        inputs, rows = remaining(found, inputs["attention_mask"], kept), rows[kept]
    return sequences[:, :width]


def remaining(found: Any, attention_mask: Tensor, kept: Tensor) -> dict[str, Any]:
    """Inputs with which `generate` continues some rows of its output over their part of the cache."""
    found.past_key_values.batch_select_indices(kept)
    grown = attention_mask.new_ones(len(kept), found.sequences.shape[1] - attention_mask.shape[1])
    return {
        "input_ids": found.sequences[kept],
        "attention_mask": torch.cat([attention_mask[kept], grown], dim=1),
        "past_key_values": found.past_key_values,
    }


def rows_may_leave(model: Any, input_ids: Tensor, attention_mask: Tensor, pad: int) -> bool:
    """Whether the last row continues greedily as before once the others have left. Tried, not looked up by type.

    Recurrent states cannot leave row by row, and some models keep more of a batch than its cache.
    """

    def generated(new: int, **inputs: Any) -> Any:
        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, pad_token_id=pad, bos_token_id=None, eos_token_id=None,
            return_dict_in_generate=True, disable_compile=True,
        )  # fmt: skip
        return model.generate(**inputs, generation_config=config)

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    whole = generated(8, **inputs).sequences[-1:]
    try:
        some = remaining(
            generated(3, **inputs), attention_mask, torch.tensor([len(input_ids) - 1]).to(input_ids.device)
        )
        return torch.equal(generated(5, **some).sequences, whole)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
