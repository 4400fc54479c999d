"""Training steps on the CPU, and again on the pretended device. Prints what each gives and the host's waits, as JSON.

A process of its own: the device takes PyTorch's one slot for such backends, and accelerate is told that it is its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from one_step import step
from pretended_device import DEVICE, Pretending, moved, waits
from torch import Tensor

from topd.near_future import self_check
from topd.near_future.self_check import check_model
from topd.near_future.ways import _KNOWN, Ways


@contextmanager
def on_device(trainer: Any) -> Iterator[None]:
    """Both models and all inputs there, where attention to nothing gives NaN, as with some kernels of CUDA."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def strict(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        output = attention(query, key, value, attn_mask=attn_mask, **rest)
        return output if attn_mask is None else output.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    vars(trainer.accelerator.state)["device"] = DEVICE
    with (
        Pretending(),
        patch.object(type(trainer.args), "device", DEVICE),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", strict),
        patch.object(self_check, "check_model", check_once),
    ):
        for model in (trainer.model, trainer.teacher_model):
            _KNOWN.pop(model)  # what was found on the CPU
        moved(trainer.model), moved(trainer.teacher_model)
        yield


KNOWN: list[Ways] = []
"""Of the first model. All models here have one architecture."""


def check_once(model: Any) -> Ways:
    """Try the first model only: it takes seconds on this device."""
    if not KNOWN:
        KNOWN.append(check_model(model))
    return KNOWN[0]


def main(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    here = {name: step(**options) for name, options in cases.items()}
    there = {name: step(**options, place=on_device, waits=waits) for name, options in cases.items()}
    return {"here": here, "there": there}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # threads of autograd for the simulated device may abort the interpreter's own end
