"""One training step of a tiny pair, wherever it runs: what it gives, and how often the host waited."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_trainer

from topd.runs.console import Stopwatch

CASES: dict[str, dict[str, Any]] = {
    "rollout": {"audit_steps": 1},
    "rollout, bfloat16 weights": {"dtype": "bfloat16"},
    "regenerated": {"student_window": "regenerated"},
    "regenerated, twice the rollouts": {"student_window": "regenerated", "rollouts": 8},
    "capped": {"method": "opd-capped", "cap_selection": "random"},
    "teacher's contexts": {"guidance_context": "teacher"},
    "hidden states, entropic": {"embedding": "student_hidden", "transport_solver": "entropic", "entropic_epsilon": 0.5},
    "plain": {"method": "opd", "opd_loss": "trl"},
    "plain, one pass": {"method": "opd", "opd_loss": "one_pass"},
}
"""Options of steps. Prompts differ in length, so some rollouts are padded on the left."""


class CountsWaits(Stopwatch):
    """Adds up the host's waits by stage, beside the seconds."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.all, self.waits = waits, defaultdict[str, int](int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.all.total()
        with super().__call__(name):
            yield
        self.waits[name] += self.all.total() - before


def step(
    dtype: str = "float32",
    rollouts: int = 4,
    place: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    waits: Counter[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Loss, norm of one gradient, metrics, and the waits by stage of one step on greedy rollouts."""
    models = [tiny_model(seed, width).to(getattr(torch, dtype)) for seed, width in ((0, 64), (1, 96))]
    trainer = tiny_trainer(
        Path(tempfile.mkdtemp()), student=models[0], teacher=models[1], per_device_train_batch_size=rollouts,
        max_completion_length=12, generation_kwargs={"do_sample": False}, **options,
    )  # fmt: skip
    rows = [trainer.train_dataset[index] for index in range(rollouts)]
    trainer.current_gradient_accumulation_steps = 1
    waits = Counter() if waits is None else waits
    trainer._stage = stage = CountsWaits(waits)
    trainer.model.train()
    with place(trainer):
        trainer._try_ways()  # once per process, so not part of a step's waits
        waits.clear()
        loss = trainer.training_step(trainer.model, rows)
        counted = dict(stage.waits) | {"by line": dict(waits.most_common())}
    gradient = trainer.model.model.layers[0].mlp.down_proj.weight.grad.float().cpu().norm()
    metrics = {name: value[0] for name, value in trainer._metrics["train"].items() if "/" in name}
    logged = {name: value for name, value in metrics.items() if not name.startswith("seconds")}
    return {"loss": loss.item(), "gradient": gradient.item(), "metrics": logged, "waits": counted}
