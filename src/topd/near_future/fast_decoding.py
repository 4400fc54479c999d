"""What makes decoding faster and changes nothing but rounding: merged adapters, packed weights, one random number."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import psutil
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.functional import linear

from topd.near_future.model_parts import wrapped_forwards


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """Run a model without gradients, a few tokens at a time: `adapters_merged` and `weights_packed`."""
    with adapters_merged(model), weights_packed(model):
        yield


# ------------------------------------------------------------------------------------------------------ merged adapters


@contextmanager
def adapters_merged(model: Any) -> Iterator[None]:
    """Run a PEFT model with its adapters merged into copies of its weights; afterwards it is as before, to the bit.

    It computes the same up to rounding, without the adapters' small matrix products, which take a fifth of the time of
    decoding. Only where all adapted layers are float32 linear layers whose weights are neither shared nor sharded, and
    PEFT can merge them; else nothing changes. In bfloat16, also by autocast, a merge would round the adapters away.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    bases: list[nn.Module] = [layer.get_base_layer() for layer in layers] if is_peft_model(model) else []
    if not _may_merge(model, bases):
        bases = []
    saved = [(parameter, parameter.data) for base in bases for parameter in base.parameters()]
    merged = [layer for layer in layers if bases and not (layer.merged or layer.disable_adapters)]

    def put_back() -> None:
        for parameter, data in saved:
            parameter.data = data
        for layer in merged:
            layer.merged_adapters.clear()

    try:
        try:
            for parameter, data in saved:
                parameter.data = data.clone()
            for layer in merged:
                layer.merge()
        except (RuntimeError, ValueError):  # PEFT cannot merge this kind of adapter
            put_back()
        yield
    finally:
        put_back()


def _may_merge(model: Any, bases: Sequence[nn.Module]) -> bool:
    """Whether a merge into these layers rounds nothing away, and changes no other layer."""
    if not all(type(base) is nn.Linear and base.weight.dtype == torch.float32 for base in bases):
        return False
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = any(uses[id(base.weight)] > 1 for base in bases)
    device_type = next(model.parameters()).device.type
    return not (shared or _sharded(model) or torch.is_autocast_enabled(device_type) or wrapped_forwards(model))


def _sharded(model: nn.Module) -> bool:
    """By FSDP or ZeRO-3."""
    modules = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return modules or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------- packed weights


@contextmanager
def weights_packed(model: nn.Module) -> Iterator[None]:
    """On a CPU, run linear layers on copies of their weights in the layout that oneDNN multiplies with.

    A product of a few rows otherwise spends half of its time on weights in an unsuitable layout. Without gradients
    only, and where the copies take less than half of the free memory; they are gone afterwards.
    """
    layers: list[Any] = [] if _sharded(model) else [module for module in model.modules() if _may_pack(module)]
    if 2 * sum(layer.weight.nbytes for layer in layers) > psutil.virtual_memory().available:
        layers = []
    try:
        for layer in layers:
            vars(layer)["forward"] = _forward_of(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _may_pack(module: Any) -> bool:
    """Whether it is a linear layer as torch has it, with a whole weight on the CPU."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and type(module.weight.data) is Tensor


def _forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass, which packs the weights when it first needs them in a dtype."""
    copies: dict[torch.dtype, Tensor] = {}

    def forward(inputs: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        if torch.is_grad_enabled() or not (autocast or inputs.dtype == dtype) or not _packs(dtype):
            return linear(inputs, weight, bias)
        if dtype not in copies:
            copies[dtype] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        return _product(inputs.to(dtype), copies[dtype], None if bias is None else bias.to(dtype))

    return forward


def _product(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return product


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's products in a dtype, on this CPU."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    inputs, weight = torch.ones(2, 16, dtype=dtype), torch.eye(16, dtype=dtype)
    try:
        product = _product(inputs, torch.ops.mkldnn._reorder_linear_weight(weight), None)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product, inputs)


# -------------------------------------------------------------------------------------------- one random number a token


@contextmanager
def tokens_by_inversion() -> Iterator[None]:
    """On a CPU, `torch.multinomial` draws one number per row and inverts the cumulative distribution at it.

    It draws one per token of the vocabulary otherwise, which takes a fifth of a decoding step of a small model.
    """
    usual = torch.multinomial

    def draw(probabilities: Tensor, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        if probabilities.device.type != "cpu" or num_samples != 1 or args or kwargs:
            return usual(probabilities, num_samples, *args, **kwargs)
        below = probabilities.double().cumsum(-1)
        whole = below[..., -1:]
        if not bool(((whole > 0) & whole.isfinite()).all()):  # an error
            return usual(probabilities, num_samples)
        chosen = torch.searchsorted(below, torch.rand_like(whole) * whole, right=True)
        return chosen.clamp(max=probabilities.shape[-1] - 1)

    with patch.object(torch, "multinomial", draw):
        yield
