"""Which prompts may share a batch of `generate`, for code that only generates."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model

from topd.near_future.compact_sampling import rows_may_leave
from topd.near_future.generation import own_settings_only
from topd.near_future.limits import lengths_of
from topd.near_future.model_parts import evaluating, without_autocast
from topd.near_future.padding import left_padded
from topd.near_future.self_check import Check
from topd.near_future.true_states import padding_id
from topd.near_future.ways import Batching


@torch.no_grad()
def batching_of(model: Any, longest: int) -> Batching:
    """Which prompts get the responses that they get alone, tried with two short random ones as `ways_of` does.

    Args:
        model: any causal language model of transformers; a PEFT model is fine.
        longest: tokens of the longest prompt and its response.
    """
    inner = model.base_model.model if is_peft_model(model) else model
    lengths, device_type = lengths_of(inner), next(inner.parameters()).device.type
    plainly = evaluating(model), own_settings_only(inner), without_autocast(inner, device_type)
    with plainly[0], plainly[1], plainly[2], lengths.out_of_reach():
        try:
            check = Check(inner)
            found = check.batching()
            if found.padded:
                pad, rollouts = padding_id(inner), check.sample.rollouts
                prompts = left_padded([rollouts.prefix(row, 0) for row in range(len(rollouts))], pad)
                found = found._replace(leaving=rows_may_leave(inner, *prompts, pad))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # alone, its responses are right all the same
            return Batching(False, False, f"it could not be tried: {str(error).partition(chr(10))[0]}")
    for limit in (lengths.switch, lengths.end):
        if found.padded and limit is not None and longest > limit:
            return Batching(False, True, f"rotary embeddings depend on the longest row beyond {limit:,} tokens")
    return found
