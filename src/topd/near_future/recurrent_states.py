"""Recurrent states at the places where windows branch off a rollout, for models with linear attention or convolutions.

Keys and values of a prefix are part of those of the rollout; a recurrent state is not part of a later one. So the
rollout is read once more, in segments that end where windows branch off, and the states are copied there. That is one
forward pass per rollout in the place of one per window.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from topd.near_future.padding import takes_positions
from topd.near_future.windows import Rollouts

BRANCHES_AT_ONCE = 128
"""Branches whose states are in memory together: as many as fresh prefixes would be (`LocalModel.batch_size`)."""
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


def cache_argument(backbone: Any) -> str:
    """Name of the argument through which a backbone's forward takes a cache."""
    parameters = inspect.signature(type(backbone).forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in parameters)


def empty_cache(backbone: Any) -> DynamicCache:
    """A cache as `generate` would make it."""
    return DynamicCache(config=backbone.config.get_text_config())


def is_recurrent(cache: Cache) -> bool:
    """Whether some layers keep states of a fixed size."""
    return any(hasattr(layer, "conv_states") for layer in cache.layers)


def rows_at_once(backbone: Any, counts: list[int]) -> Iterator[slice]:
    """Rollouts whose branches may be decoded together; `counts`: branches of each.

    A rollout takes as many rows of the batch as the one with the most branches. One rollout is never divided.
    """
    start, most = 0, 0
    limit = BRANCHES_AT_ONCE if is_recurrent(empty_cache(backbone)) else math.inf
    for row, count in enumerate(counts):
        most = max(most, count)
        if row > start and (row + 1 - start) * most > limit:
            yield slice(start, row)
            start, most = row, count
    yield slice(start, len(counts))


def states_at(backbone: Any, rollouts: Rollouts, place: Tensor) -> DynamicCache | None:
    """A cache for branches that start at these places; None for a model that keeps nothing but keys and values.

    Its recurrent layers hold the states of the tokens before each place. Its attention layers hold nothing, and give
    back the keys and values that they are given: attention over the prefix is for the layout of the branches.

    Args:
        place: [rollout, branch] index in the row of the first token that a branch is fed.

    Returns:
        The cache of rollout * branch rows.
    """
    branches = empty_cache(backbone)
    if not is_recurrent(branches):
        return None
    for number, (places, padding) in enumerate(zip(place.tolist(), rollouts.padding.tolist(), strict=True)):
        ids = rollouts.input_ids[number, padding:]
        cache, read = empty_cache(backbone), 0
        for end in sorted({at - padding for at in places}):
            _read_on(backbone, ids, cache, read, end)
            read = end
            rows = [number * len(places) + slot for slot, at in enumerate(places) if at - padding == end]
            _copy_states(cache, branches, rows, place.numel())
    layers: list[Any] = branches.layers
    for layer in layers:
        if hasattr(layer, "keys"):
            layer.update = lambda keys, values, *_, **__: (keys, values)
    return branches


def _read_on(backbone: Any, ids: Tensor, cache: DynamicCache, start: int, end: int) -> None:
    inputs: dict[str, Any] = {"input_ids": ids[None, start:end], "use_cache": True, cache_argument(backbone): cache}
    if takes_positions(backbone):
        inputs["position_ids"] = torch.arange(start, end, device=ids.device)[None]
    backbone(**inputs)


def _copy_states(source: Cache, target: Cache, rows: list[int], batch: int) -> None:
    """Copy the only row of a cache's recurrent states to rows of another cache."""
    for old, new in zip(source.layers, target.layers, strict=True):
        if not hasattr(old, "conv_states"):
            continue
        for name in vars(LinearAttentionLayer()):
            value = getattr(old, name)
            if name not in ("conv_states", "recurrent_states"):
                setattr(new, name, dict(value) if isinstance(value, dict) else value)
                continue
            for index, state in value.items():
                if state is None:
                    continue
                states = getattr(new, name)
                if states[index] is None:
                    states[index] = state.new_zeros(batch, *state.shape[1:])
                states[index][rows] = state
