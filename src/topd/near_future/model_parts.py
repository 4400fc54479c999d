"""How a transformers model is used: its backbone and head, the state that it runs in, padded batches, generation."""

import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from topd.algorithm import Head
from topd.errors import TOPDError

UNREAD_BY_TRL = ("logits_mup_width_multiplier", "output_logit_soft_cap", "logits_soft_cap")
"""Entries of a config that change the logits and that the loss of TRL 1.16 does not look at."""
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Settings of vLLM and SGLang that change nothing, for `SamplingParams` and for requests. A server takes what a request
leaves out from the model's generation config."""

# ---------------------------------------------------------------------------------------------------------------- parts


def inside_peft(model: Any) -> Any:
    """The model without PEFT's wrapper (adapters stay in place)."""
    return model.base_model.model if is_peft_model(model) else model


def backbone_of(model: Any) -> nn.Module:
    """The decoder without its output head (adapters stay in place)."""
    inner = inside_peft(model)
    backbone: nn.Module = inner.base_model
    if inner.base_model is inner:  # its base_model_prefix names no attribute (Llama 4's text model)
        backbone = getattr(inner, "model", None) or inner.get_decoder()
    return backbone


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

    A linear layer with a forward pass of its own, such as one that scales each token's logit, is run on the unit
    vectors.

    Raises:
        TOPDError: an adapter on the output head that is no plain LoRA.
    """
    weight, base = whole(layer.weight), getattr(layer, "base_layer", layer)
    if isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward:
        units = torch.eye(base.in_features, dtype=weight.dtype, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            weight = (base(units) - (0 if base.bias is None else base.bias)).T.to(weight.dtype)
    if "base_layer" not in dict(layer.named_children()) or layer.disable_adapters or layer.merged:
        return weight
    biased = getattr(layer, "lora_bias", {})
    for adapter in layer.active_adapters:
        if not hasattr(layer, "lora_A") or adapter in layer.lora_variant or biased.get(adapter):
            raise TOPDError(
                "On the output head only plain LoRA adapters work, without bias, no DoRA and no other kind: leave "
                "lm_head out of the adapter's targets, and embed_tokens if both are one tensor."
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


# ---------------------------------------------------------------------------------------------------------------- state


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
    wrapped = wrapped_forwards(model)
    forwards = [vars(module).pop("forward") for module in wrapped]
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            vars(module)["forward"] = forward


def wrapped_forwards(model: Any) -> list[nn.Module]:
    """The model and its backbone, where something such as autocast stands around the forward pass."""
    hooks = "_hf_hook"  # they move tensors between devices
    parts = model, backbone_of(model)
    return [module for module in parts if _own_forward(module) and not hasattr(module, hooks)]


def _own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is another one than its class has. TRL puts that back as an attribute."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


# ------------------------------------------------------------------------------------------------------- padded batches


def left_padded(sequences: Sequence[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """[sequence, longest] token ids padded on the left with `value`, and the mask that is 1 at tokens."""
    ones = [torch.ones_like(sequence) for sequence in sequences]
    ids = pad_sequence(list(sequences), batch_first=True, padding_value=value, padding_side="left")
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


def positions_in(mask: Tensor) -> Tensor:
    """[row, index] position ids that count tokens only: 0 in left padding, the last token's in right padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def takes_positions(backbone: nn.Module) -> bool:
    """Whether the backbone's forward takes `position_ids`."""
    return "position_ids" in inspect.signature(type(backbone).forward).parameters


def last_states(backbone: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[row, index, width] the last hidden states that rows of token ids [row, index] have without padding.

    `mask`: [row, index], 1 at tokens; None: no row is padded on the left.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if mask is not None and takes_positions(backbone):
        inputs["position_ids"] = positions_in(mask)
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, group by group, in the order in which the keys first come."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------------------- generation


@contextmanager
def own_settings_only(model: Any) -> Iterator[None]:
    """Within it, `model.generate` fills in transformers' defaults, not the model's own generation config.

    Otherwise results would depend on settings that are neither printed nor recorded.
    Both a PEFT model and its base hold the config, so every module that has one gets a neutral one for the time.
    Experts' routers give no load-balancing loss (`output_router_logits`), which fails where prompts are padded.
    """
    neutral, config = GenerationConfig(), model.config.get_text_config()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(vars(module).get("generation_config"), GenerationConfig):
                stack.enter_context(patch.object(module, "generation_config", neutral))
        if getattr(config, "output_router_logits", False):
            stack.enter_context(patch.object(config, "output_router_logits", False))
        yield


def end_token_ids(generation_config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Ids that end a response: the tokenizer's end of sequence, then all that the generation config has (TRL's rule).

    Instruction-tuned models often have two, such as the end of a turn and the end of a text.
    """
    declared = None if generation_config is None else generation_config.eos_token_id
    more = declared if isinstance(declared, list | tuple) else [declared]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *more]) if token is not None]


def one_beginning(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids with at most one BOS at the beginning: the template writes one, and the tokenizer may add another."""
    first = 0
    while tokenizer.bos_token_id is not None and list(ids[first : first + 2]) == [tokenizer.bos_token_id] * 2:
        first += 1
    return list(ids[first:])


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding token; without one its end of sequence, else 0 (padding is always masked)."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return next(known, 0)
