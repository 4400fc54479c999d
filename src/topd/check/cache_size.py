"""What a model keeps of the tokens that it has read, found by a forward pass on a model without storage."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from topd.near_future.attention_interface import attending_in
from topd.near_future.model_parts import backbone_of
from topd.near_future.recurrent_states import cache_argument, empty_cache
from topd.near_future.tree_attention import Recording

TOKENS = 4
"""Of the row that is tried."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes of one row.

    `layers`: of each layer with keys and values (or latents), the bytes of a token and how many tokens it keeps.
    `prefix`: of one token of a prefix over which windows are decoded, whose keys and values are whole.
    """

    layers: tuple[tuple[float, float], ...]
    states: float  # of all recurrent layers, at any length
    prefix: float

    def of(self, tokens: float) -> float:
        """Bytes in the cache of `generate` after this many tokens."""
        return self.states + sum(each * min(tokens, most) for each, most in self.layers)


@torch.no_grad()
def tried_cache(model: Any) -> CacheSize | None:
    """The sizes of a causal language model of transformers, best one on the meta device.

    None where the model cannot run without storage, or keeps something else than transformers' dynamic cache.
    """
    backbone: Any = backbone_of(model)
    recording = Recording()
    try:
        if getattr(model, "_can_set_experts_implementation", bool)():
            model.set_experts_implementation("batched_mm")  # the others look at how tokens are routed
        try:
            with attending_in(recording, backbone.config):
                cache = _filled_cache(backbone)
        except Exception:  # masks of its own, so that no prefix is kept; or what the plain forward pass finds again
            recording.kept.clear()
            cache = _filled_cache(backbone)
    except Exception:  # whatever an architecture finds missing: the caller has a formula
        return None
    kept_layers: list[Any] = cache.layers
    layers, states = [], 0.0
    for layer in kept_layers:
        parts: list[dict[int, torch.Tensor | None]] = [
            getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")
        ]
        states += sum(state.nbytes for part in parts for state in part.values() if state is not None)
        if getattr(layer, "keys", None) is not None:
            kept = sum(getattr(layer, name).nbytes for name in ("keys", "values"))
            most = getattr(layer, "sliding_window", None)  # its cache holds the tokens that the next one attends to
            layers.append((kept / layer.keys.shape[-2], math.inf if most is None else most - 1))
    if not layers and not states:
        return None
    prefix = sum(tensor.nbytes for pair in recording.kept for tensor in pair) / TOKENS
    return CacheSize(tuple(layers), states, prefix)


def _filled_cache(backbone: Any) -> DynamicCache:
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=next(backbone.parameters()).device)
    cache = empty_cache(backbone)
    backbone(**{"input_ids": ids, "use_cache": True, cache_argument(backbone): cache})
    return cache
