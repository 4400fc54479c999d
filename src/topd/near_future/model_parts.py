"""The parts of a transformers model that the step uses (backbone, output head), and the state that it runs them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from topd.algorithm import Head
from topd.errors import TOPDError


def backbone_of(model: Any) -> nn.Module:
    """The decoder without its output head (adapters stay in place)."""
    inner = model.base_model.model if is_peft_model(model) else model
    backbone: nn.Module = inner.base_model
    if inner.base_model is inner:  # its base_model_prefix names no attribute (Llama 4's text model)
        backbone = getattr(inner, "model", None) or inner.get_decoder()
    return backbone


UNREAD_BY_TRL = ("logits_mup_width_multiplier", "output_logit_soft_cap", "logits_soft_cap")
"""Entries of a config that change the logits and that the loss of TRL 1.16 does not look at."""


def output_head(model: Any, temperature: float = 1.0) -> Head:
    """The model's output head with everything that its config does to logits (scales, soft caps, biases)."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = _entry(config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    scaling = _entry(config, "logits_scaling", "logits_mup_width_multiplier")
    if scale is None and scaling is not None:  # Granite, MiniCPM3 and Inkling divide, HyperCLOVA X multiplies
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    bias = getattr(layer, "bias", None)
    return Head(
        weight=_weight(layer),
        bias=None if bias is None else whole(bias),
        scale=1.0 if scale is None else float(scale),
        softcap=_entry(config, "final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap"),
        temperature=temperature,
    )


def _entry(config: Any, *names: str) -> Any:
    """The first of these entries that a config has."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _weight(layer: Any) -> Tensor:
    """[vocabulary, width] what the layer multiplies with: of a LoRA layer the base's weight and its active adapters'.

    Raises:
        TOPDError: an adapter on the output head that is no plain LoRA.
    """
    weight = whole(layer.weight)
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            raise TOPDError(
                "On the output head only plain LoRA adapters work, no DoRA: leave lm_head out of the targets."
            )
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def whole(parameter: Tensor) -> Tensor:
    """The full tensor of a parameter that FSDP2 may have sharded."""
    if isinstance(parameter, torch.distributed.tensor.DTensor):
        return parameter.full_tensor()
    return parameter


def cache_of(output: Any) -> Any:
    """The keys and values that a backbone returns: `cache` since transformers 5.24, `past_key_values` before."""
    return output.cache if "cache" in output else output.get("past_key_values")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """In training mode, without using up random numbers; afterwards in evaluation mode."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.train()
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        model.eval()


@contextmanager
def without_autocast(model: Any, device_type: str) -> Iterator[None]:
    """In the dtype of the weights, also where autocast stands around the forward pass of the model or its backbone."""
    wrapped = [
        module
        for module in (model, backbone_of(model))
        if "forward" in vars(module) and not hasattr(module, "_hf_hook")  # hooks move tensors between devices
    ]
    forwards = [vars(module).pop("forward") for module in wrapped]
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            vars(module)["forward"] = forward
