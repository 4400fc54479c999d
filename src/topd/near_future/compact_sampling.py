"""Sample in batches that get smaller: rollouts that have ended leave, instead of being padded to the longest.

`generate` decodes every row until the last one ends. Where lengths differ by a factor of two or three, as in worked
solutions, half of its work is padding. Here it stops whenever half of its rows have ended, and continues the others
over their part of the cache. Each row's distribution is the same; the random numbers are not those of one call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

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
    """In this block `model.generate` drops rows that have ended; `states`, if any, keeps its states."""
    with patch.object(model, "generate", partial(generate_compactly, model.generate, states)):
        yield


def generate_compactly(
    generate: Any, states: SamplingStates | None, *, input_ids: Tensor, attention_mask: Tensor, generation_config: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The sequences that `generate` returns: [row, token], padded on the right."""
    start, longest = input_ids.shape[1], generation_config.max_new_tokens
    ends = torch.as_tensor(generation_config.eos_token_id, device=input_ids.device).flatten()
    rows = torch.arange(len(input_ids), device=input_ids.device)
    sequences = input_ids.new_full((len(rows), start + longest), generation_config.pad_token_id)
    cache: dict[str, Any] = {}
    while len(rows):
        stop = HalfHaveEnded(start, ends)
        config = copy.copy(generation_config)
        config.max_new_tokens = start + longest - input_ids.shape[1]
        config.return_dict_in_generate = True
        if states is not None:
            states.rows = rows
        found = generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop]), **cache, **kwargs,
        )  # fmt: skip
        width = found.sequences.shape[1]
        sequences[rows, :width] = found.sequences
        kept = (~stop.ended(found.sequences)).nonzero().squeeze(-1)
        if width == start + longest or len(kept) == 0:
            break
        found.past_key_values.batch_select_indices(kept)
        cache, input_ids, rows = {"past_key_values": found.past_key_values}, found.sequences[kept], rows[kept]
        grown = attention_mask.new_ones(len(kept), width - attention_mask.shape[1])
        attention_mask = torch.cat([attention_mask[kept], grown], dim=1)
    return sequences[:, :width]
