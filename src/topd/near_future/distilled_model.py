"""Student and teacher as the step sees them: hidden states, an output head, embeddings, and continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig

from topd.algorithm import Head
from topd.near_future.branches import Branches, hidden_with_branches, rollout_hidden
from topd.near_future.sources import ContinuesPrefixes
from topd.near_future.windows import Rollouts, Windows

Forward = Callable[..., Any]
"""Runs `function(*args)` inside the wrapped model's forward, so that DDP, FSDP or DeepSpeed see it."""


class DistilledModel:
    """One of the two models.

    Args:
        model: the unwrapped causal language model of transformers (a PEFT model is fine).
        source: continues prefixes; a context manager factory, since a trained model is unwrapped for generation.
        forward: see `Forward`.
        temperature: of the token loss, as in TRL.
        micro_batch: rollouts that are scored together.
    """

    def __init__(
        self,
        model: Any,
        source: Callable[[], AbstractContextManager[ContinuesPrefixes]],
        forward: Forward = lambda function, *args: function(*args),
        temperature: float = 1.0,
        micro_batch: int = 8,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self._source, self._forward, self._micro_batch = source, forward, micro_batch

    @property
    def backbone(self) -> nn.Module:
        """The decoder without its output head (adapters stay in place)."""
        inner = self.model.base_model.model if is_peft_model(self.model) else self.model
        backbone: nn.Module = inner.base_model
        return backbone

    @property
    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self.model.config
        return config

    def head(self) -> Head:
        return output_head(self.model, self.temperature)

    def embeddings(self) -> Tensor:
        """[vocabulary, width] static input embeddings."""
        return whole(self.model.get_input_embeddings().weight).detach()

    @torch.no_grad()
    def hidden(self, rollouts: Rollouts) -> Tensor:
        """[rollout, position, width]: the states that predict each response token, in evaluation mode, no gradient."""
        with evaluating(self.model):
            return torch.cat(
                [
                    self._forward(rollout_hidden, self.backbone, rollouts[start : start + self._micro_batch])
                    for start in range(0, len(rollouts), self._micro_batch)
                ]
            )

    def hidden_and_windows(
        self, rollouts: Rollouts, branches: Branches | None, from_rollout: bool = False
    ) -> tuple[Tensor, Tensor]:
        """States that predict the response tokens, and those that predict the windows' tokens, with gradients.

        With `from_rollout`, the windows are the rollout's own tokens, whose states the row already holds.
        """
        if branches is None:
            return rollout_hidden(self.backbone, rollouts), torch.empty(0)
        if not from_rollout:
            return hidden_with_branches(self.backbone, self.config, rollouts, branches)
        hidden = rollout_hidden(self.backbone, rollouts)
        length = branches.tokens.shape[-1]
        index = branches.position[:, :, None] + torch.arange(length, device=hidden.device)
        row = torch.arange(len(rollouts), device=hidden.device)[:, None, None]
        return hidden, hidden[row, index.clamp(max=hidden.shape[1] - 1)]

    @torch.no_grad()
    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        """[rollout, branch, window_position, width]: the states that predict the windows' tokens, no gradient."""
        with evaluating(self.model):
            parts = []
            for start in range(0, len(rollouts), self._micro_batch):
                rows = slice(start, start + self._micro_batch)
                parts.append(
                    self._forward(hidden_with_branches, self.backbone, self.config, rollouts[rows], branches[rows])[1]
                )
        return torch.cat(parts)

    @torch.no_grad()
    def states_of(self, prefixes: Sequence[Tensor], windows: Windows) -> Tensor:
        """[window, window_position, width]: last hidden states at the window tokens themselves."""
        ids = [
            torch.cat([prefix, tokens]) for prefix, tokens in zip(prefixes, windows.tokens, strict=True)
        ]  # padding after EOS is never looked at
        longest = max(len(row) for row in ids)
        batch = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in ids])
        mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids])
        states = []
        with evaluating(self.model):
            for start in range(0, len(ids), self._micro_batch):
                rows = slice(start, start + self._micro_batch)
                states.append(self._forward(last_hidden_state, self.backbone, batch[rows], mask[rows]))
        return torch.cat(states)[:, longest - windows.tokens.shape[1] :]

    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """The model's own near future from each prefix, in evaluation mode."""
        with evaluating(self.model), self._source() as source:
            return source.continue_(prefixes, length)


def last_hidden_state(backbone: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states


def output_head(model: Any, temperature: float = 1.0) -> Head:
    """The model's output head with everything that its config does to logits (scales, soft caps, biases)."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        if scaling is not None:
            scale = float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)
    bias = getattr(layer, "bias", None)
    return Head(
        weight=whole(layer.weight),
        bias=None if bias is None else whole(bias),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
    )


def whole(parameter: Tensor) -> Tensor:
    """The full tensor of a parameter that FSDP2 may have sharded."""
    if isinstance(parameter, torch.distributed.tensor.DTensor):
        return parameter.full_tensor()
    return parameter


class evaluating:
    """Put a model in evaluation mode, and back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)


def fixed(source: ContinuesPrefixes) -> Callable[[], AbstractContextManager[ContinuesPrefixes]]:
    """A source that needs no unwrapping."""
    return lambda: nullcontext(source)
