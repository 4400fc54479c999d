"""A device that computes on the CPU, refuses to mix with it as CUDA does, and counts when the host waits.

Register it in a process of its own: PyTorch has one slot for a backend written in Python. `is_cuda` is True of its
tensors, so that what CUDA alone takes runs, in emulation.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", backend_module=_Module())
DEVICE = torch.device("pretended:0")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "equal"}
"""Operations whose result the host needs before it can go on."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
CROSSING = {"_to_copy", "copy_"}
waits: Counter[str] = Counter()
"""Times that the host waited, by the line of this project that asked for it."""


class OnDevice(torch.Tensor):
    """A tensor there; `kept` is the CPU tensor that holds its values."""

    kept: Tensor
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: Tensor) -> OnDevice:
        layout = {"strides": kept.stride(), "storage_offset": kept.storage_offset(), "dtype": kept.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, kept.shape, device=DEVICE, **layout)
        tensor.kept = kept
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def tolist(self) -> Any:
        count("tolist")
        return self.kept.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.kept!r})"


class Pretending(TorchDispatchMode):
    """Within it tensors can be made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """One operation of ATen, on the CPU if nothing of it is on the device."""
    name = function._schema.name.removeprefix("aten::")
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, OnDevice)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    onto = bool(there) if target is None else target.type == DEVICE.type
    if not there and not onto:
        return function(*args, **kwargs)
    crosses = (bool(there) != onto) if name == "_to_copy" else len(there) < len(tensors)
    if name in CROSSING and crosses:
        count(name)
        onto = isinstance(args[0], OnDevice) if name == "copy_" else onto
    elif there and any(each.dim() > 0 for each in tensors if not isinstance(each, OnDevice)) and name not in INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} has some on the CPU.")
    if name in INDEXING and not isinstance(args[0], OnDevice) and any(isinstance(i, OnDevice) for i in args[1]):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    for _ in range(name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
        count(name)
    if name in INDEXING:
        for index in args[1]:
            if index is not None and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, OnDevice)):
                count(f"{name} by a mask or from the CPU")
    if name == "_fused_sdp_choice":
        return 0  # plain matrix products
    originals = {id(each.kept): each for each in there}
    bare = tree_map(lambda x: x.kept if isinstance(x, OnDevice) else x, (args, kwargs))
    if target is not None:
        bare[1]["device"] = torch.device("cpu")
    result = emulated(function, *bare)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or not onto:
            return value
        return originals.get(id(value)) or OnDevice(value) if id(value) not in originals else originals[id(value)]

    return tree_map(wrapped, result)


def emulated(function: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU, which has no product of 16-bit factors with a float32 result."""
    if function is torch.ops.aten.mm.dtype_out:
        return kwargs["out"].copy_(args[0].to(args[2]) @ args[1].to(args[2]))
    if function is torch.ops.aten.addmm.dtype_out:
        return kwargs["out"].copy_(args[0] + args[1].to(args[3]) @ args[2].to(args[3]))
    return function(*args, **kwargs)


def count(what: str) -> None:
    frame = sys._getframe(1)
    while frame is not None and "/topd/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = "elsewhere" if frame is None else f"{frame.f_code.co_filename.rpartition('/topd/')[2]}:{frame.f_lineno}"
    waits[f"{where} {what}"] += 1


_kernels = torch.library.Library("aten", "IMPL")
"""What `torch.tensor(..., device=)` calls past every mode."""


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    count("copy")
    target.kept.copy_(source)
    return target


_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")


def moved(model: nn.Module) -> nn.Module:
    """A model with its parameters and buffers on the device, in place; shared parameters stay shared."""
    new: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in new:
                    new[parameter] = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = new[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model
