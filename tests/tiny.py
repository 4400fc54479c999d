"""Tiny random models and trainers for tests. Weights are scaled up, so that distributions differ and forks exist."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topd.demo.build import new_model
from topd.embedded.task import make_problems
from topd.embedded.tokenizer import build_tokenizer
from topd.near_future.ways import _KNOWN, Ways, ways_of
from topd.training import TOPDConfig, TOPDTrainer

TOKENIZER = build_tokenizer()


def tiny_model(seed: int, width: int = 64, scale: float = 3.0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = new_model(TOKENIZER, width, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    _KNOWN.setdefault(model, {})[model.config._attn_implementation] = _ways(width)
    return model


@cache
def _ways(width: int) -> Ways:
    """The weights do not matter for what is exact, so one of each width is tried (0.5 s) and not hundreds."""
    torch.manual_seed(0)
    return ways_of(new_model(TOKENIZER, width, 2))


def prompts(n: int = 64) -> Dataset:
    return Dataset.from_list([{"prompt": problem.prompt} for problem in make_problems(n, 0, held_out=False)])


def tiny_config(out: Path, **options: Any) -> TOPDConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_completion_length": 20,
        "window_length": 5,
        "candidate_share": 0.15,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TOPDConfig(str(out), **(defaults | options))


def tiny_trainer(
    out: Path, trainer_type: type = TOPDTrainer, dataset: Dataset | None = None, student: Any = None,
    teacher: Any = None, tokenizer: PreTrainedTokenizerBase = TOKENIZER, trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    args = tiny_config(out, **options)
    return trainer_type(
        model=student if student is not None else tiny_model(0),
        teacher_model=teacher if teacher is not None else tiny_model(1, width=96),
        args=args,
        train_dataset=dataset or prompts(),
        processing_class=tokenizer,
        **(trainer_options or {}),
    )
