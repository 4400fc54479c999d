"""Recurrent states at the places where windows branch off a rollout, for models with linear attention or convolutions.

Keys and values of a prefix are part of those of the rollout; a recurrent state is not part of a later one. So the
rollout is read once more, and its recurrent layers run in segments that end where windows branch off. Their states are
copied there. That is one forward pass per rollout in the place of one per window.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from topd.near_future.model_parts import takes_positions
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


def most_at_once(backbone: Any) -> int:
    """Branches that are decoded together: all, or `BRANCHES_AT_ONCE` where each has states of its own."""
    return BRANCHES_AT_ONCE if is_recurrent(empty_cache(backbone)) else 2**31


def rows_at_once(backbone: Any, counts: list[int]) -> Iterator[slice]:
    """Rollouts whose branches are decoded together, by `most_at_once`, at least one; `counts`: branches of each."""
    start, together, limit = 0, 0, most_at_once(backbone)
    for row, count in enumerate(counts):
        together += count
        if row > start and together > limit:
            yield slice(start, row)
            start, together = row, count
    yield slice(start, len(counts))


def states_at(backbone: Any, rollouts: Rollouts, rollout: Tensor, start: Tensor) -> DynamicCache | None:
    """A cache for branches that start at these places; None for a model that keeps nothing but keys and values.

    Its recurrent layers hold the states of the tokens before each place. Its attention layers hold nothing, and give
    back the keys and values that they are given: attention over the prefix is for the layout of the branches.

    Args:
        rollout: [branch] of these rollouts, ascending.
        start: [branch] position, in prompt and response, of the first token that a branch is fed.

    Returns:
        The cache, with one row per branch.
    """
    branches = empty_cache(backbone)
    if not is_recurrent(branches):
        return None
    layers: list[Any] = branches.layers
    mixers = mixers_of(backbone, branches)
    branches_of: dict[int, dict[int, list[int]]] = {}  # a rollout's, by the number of tokens before them
    for branch, (number, at) in enumerate(zip(rollout.tolist(), start.tolist(), strict=True)):
        branches_of.setdefault(number, {}).setdefault(at, []).append(branch)
    paddings, size = rollouts.padding.tolist(), len(start)
    for number, rows in branches_of.items():
        cache = empty_cache(backbone)

        def keep(layer: int, end: int, read: Any = cache.layers, starting: dict[int, list[int]] = rows) -> None:
            _copy_states(read[layer], layers[layer], starting[end], size)

        ids, ends = rollouts.input_ids[number, paddings[number] :], sorted(rows)
        if mixers is not None:
            with in_segments(mixers, ends, keep):
                _read_on(backbone, ids, cache, 0, ends[-1])
            continue
        for begin, end in pairwise([0, *ends]):
            _read_on(backbone, ids, cache, begin, end)
            for layer in range(len(layers)):
                keep(layer, end)
    for layer in layers:
        if hasattr(layer, "keys"):
            layer.update = lambda keys, values, *_, **__: (keys, values)
    return branches


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the states of these rows only."""
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            states.update({index: None if state is None else state[rows] for index, state in states.items()})


def mixers_of(backbone: Any, cache: Cache) -> dict[int, nn.Module] | None:
    """The module that updates the states of each recurrent layer; None where that is not plain to see."""
    recurrent = {number for number, layer in enumerate(cache.layers) if hasattr(layer, "conv_states")}
    layers: list[Any] = [module for module in backbone.modules() if getattr(module, "layer_idx", None) in recurrent]
    takers = [module for module in layers if _takes_states(module)]
    around = {id(outer) for outer in takers for part in outer.modules() if part is not outer and part in takers}
    mixers = [module for module in takers if id(module) not in around]
    found = {module.layer_idx: module for module in mixers}
    return found if set(found) == recurrent and len(mixers) == len(found) else None


def _takes_states(module: nn.Module) -> bool:
    names = inspect.signature(type(module).forward).parameters
    return {"hidden_states", "attention_mask"} <= set(names) and any(name in names for name in CACHE_ARGUMENTS)


@contextmanager
def in_segments(mixers: dict[int, nn.Module], ends: list[int], after: Callable[[int, int], None]) -> Iterator[None]:
    """These modules run a row in segments, whereas everything around them runs it as a whole.

    Args:
        mixers: by number of the layer.
        ends: number of tokens up to the end of each segment; the last is the row's length.
        after: called with the layer and the end of each segment that a module has run.
    """
    with ExitStack() as stack:
        for number, mixer in mixers.items():
            segments = partial(_segments, mixer.forward, ends, partial(after, number))
            stack.enter_context(patch.object(mixer, "forward", segments))
        yield


def _segments(
    forward: Callable[..., Tensor], ends: list[int], after: Callable[[int], None], hidden_states: Tensor, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    parts = []
    for start, end in pairwise([0, *ends]):
        parts.append(forward(hidden_states[:, start:end], *args, **kwargs))
        after(end)
    return torch.cat(parts, dim=1)


def _read_on(backbone: Any, ids: Tensor, cache: DynamicCache, start: int, end: int) -> None:
    inputs: dict[str, Any] = {"input_ids": ids[None, start:end], "use_cache": True, cache_argument(backbone): cache}
    if takes_positions(backbone):
        inputs["position_ids"] = torch.arange(start, end, device=ids.device)[None]
    backbone(**inputs)


def _copy_states(source: Any, target: Any, rows: list[int], batch: int) -> None:
    """Copy the only row of a recurrent layer's states to these rows of a layer of `batch` rows.

    A layer without such states stays as it is.
    """
    if not hasattr(source, "conv_states"):
        return
    for name in vars(LinearAttentionLayer()).keys() - {"conv_states", "recurrent_states"}:
        value = getattr(source, name)
        setattr(target, name, dict(value) if isinstance(value, dict) else value)
    for read, kept in ((source.conv_states, target.conv_states), (source.recurrent_states, target.recurrent_states)):
        for index, state in read.items():
            if state is None:
                continue
            if kept[index] is None:
                kept[index] = state.new_zeros(batch, *state.shape[1:])
            kept[index][rows] = state
