"""Keep what the student computes while it samples, so that it need not read its own rollouts again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from topd.near_future.model_parts import backbone_of, cache_of
from topd.near_future.shared_prefix import Prefill
from topd.near_future.windows import Rollouts


class SamplingStates:
    """The last hidden states, and keys and values, of one call of `generate` (or of several with ever fewer rows).

    They are those of a scoring pass up to rounding, so they choose candidates and start windows; the loss that is
    trained on is computed anew, with gradients.
    """

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._fed: list[int] = []
        self._cache: Any = None
        self.rows: Tensor | None = None  # of the batch that are left in it; None: all

    @contextmanager
    def keeping(self, model: Any) -> Iterator[None]:
        """Watch the forward passes of a model that generates in this block."""
        handle = backbone_of(model).register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._fed.append(output.last_hidden_state.shape[1])
        last = output.last_hidden_state[:, -1]
        if self._states and self.rows is not None and len(self.rows) < len(self._states[0]):
            last = torch.zeros_like(self._states[0]).index_copy_(0, self.rows, last)
        self._states.append(last)
        self._cache = cache_of(output)

    def prefill(self, rollouts: Rollouts, keep_prefix: bool) -> Prefill | None:
        """As if the model had read these rollouts, or None if this was not one plain call that sampled them all.

        Whether the states are those of a scoring pass, and whether windows may use the prefix, is for `ways_of` to say.
        """
        prompt, response = rollouts.prompt_ids.shape[1], rollouts.response_ids.shape[1]
        longest = int(rollouts.response_mask.sum(1).max())
        one_call = self._fed[:1] == [prompt] and set(self._fed[1:]) <= {1}
        if not one_call or len(self._states) < longest or len(self._states[0]) != len(rollouts):
            return None
        hidden = torch.stack(self._states[:response], dim=1)
        hidden = nn.functional.pad(hidden, (0, 0, 0, response - hidden.shape[1]))
        layers = getattr(self._cache, "layers", [])
        whole = bool(layers) and all(
            getattr(layer, "keys", None) is not None
            and layer.keys.shape[2] >= prompt + longest - 1
            and len(layer.keys) == len(rollouts)
            for layer in layers
        )
        if not keep_prefix:
            return Prefill({"hidden": hidden})
        if not whole:
            return None
        return Prefill({"hidden": hidden}, [(layer.keys, layer.values) for layer in layers])


def has_dropout(model: nn.Module) -> bool:
    """Whether the model has dropout in training mode, so that states from sampling are not those of a scoring pass."""
    attention = getattr(getattr(model, "config", None), "attention_dropout", 0.0) or 0.0
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or attention > 0
