"""The parts of a transformers model that the step uses: the backbone, the output head, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from topd.algorithm import Head


def backbone_of(model: Any) -> nn.Module:
    """The decoder without its output head (adapters stay in place)."""
    inner = model.base_model.model if is_peft_model(model) else model
    backbone: nn.Module = inner.base_model
    return backbone


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


def cache_of(output: Any) -> Any:
    """The keys and values that a backbone returns: `cache` since transformers 5.24, `past_key_values` before."""
    return output.cache if "cache" in output else output.get("past_key_values")


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that a model keeps for one token, all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = next(model.parameters()).element_size()
    return int(2 * config.num_hidden_layers * heads * width * item)


class evaluating:
    """Put a model in evaluation mode, and back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)
