"""Training steps on the CPU, and again on the pretended device. Prints what each gives and the host's waits, as JSON.

A process of its own: the device takes PyTorch's one slot for such backends, and accelerate is told that it is its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pretended_device import DEVICE, Pretending, moved, waits
from tiny import tiny_model, tiny_trainer
from torch import Tensor

from topd.training.stages import Stopwatch


class CountsWaits(Stopwatch):
    """Adds up the host's waits by stage, instead of seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = waits.total()
        with super().__call__(name):
            yield
        self.waits[name] += waits.total() - before


@contextmanager
def on_device(trainer: Any) -> Iterator[None]:
    """Let accelerate and TRL place inputs there, where attention to nothing gives NaN, as with some kernels of CUDA."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def strict(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        output = attention(query, key, value, attn_mask=attn_mask, **rest)
        return output if attn_mask is None else output.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    vars(trainer.accelerator.state)["device"] = DEVICE
    with (
        patch.object(type(trainer.args), "device", DEVICE),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", strict),
    ):
        yield


def step(dtype: str = "float32", rollouts: int = 4, there: bool = False, **options: Any) -> dict[str, Any]:
    """Loss, norm of one gradient, metrics, and the waits by stage of one training step; greedy rollouts."""
    models = [tiny_model(seed, width).to(getattr(torch, dtype)) for seed, width in ((0, 64), (1, 96))]
    trainer = tiny_trainer(
        Path(tempfile.mkdtemp()), student=models[0], teacher=models[1], per_device_train_batch_size=rollouts,
        generation_kwargs={"do_sample": False}, **options,
    )  # fmt: skip
    rows = [trainer.train_dataset[index] for index in range(rollouts)]
    trainer.current_gradient_accumulation_steps = 1
    if there:
        moved(trainer.model), moved(trainer.teacher_model)
    trainer._stage = stage = CountsWaits()
    waits.clear()
    trainer.model.train()
    with on_device(trainer) if there else nullcontext():
        loss = trainer.training_step(trainer.model, rows)
    counted = dict(stage.waits) | {"by line": dict(waits.most_common())}
    gradient = trainer.model.model.layers[0].mlp.down_proj.weight.grad.float().cpu().norm()
    metrics = {name: value[0] for name, value in trainer._metrics["train"].items() if "/" in name}
    logged = {name: value for name, value in metrics.items() if not name.startswith("seconds")}
    return {"loss": loss.item(), "gradient": gradient.item(), "metrics": logged, "waits": counted}


def main(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    here = {name: step(**options) for name, options in cases.items()}
    with Pretending():
        there = {name: step(**options, there=True) for name, options in cases.items()}
    return {"here": here, "there": there}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
