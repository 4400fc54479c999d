"""Kinds of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import json
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """Of an argument such as '{"enable_thinking": false}'."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"write a JSON object, not {text[:60]!r}")
    return value


class FromRecipe(argparse.Action):
    """`--config` of the analyses: pair, prompts, template and windows of a training run. Options after it win."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for name, value in recipe_options(values).items():
            if value is not None and hasattr(namespace, name):
                setattr(namespace, name, value)


def recipe_options(file: str) -> dict[str, Any]:
    """Options of the analyses by their names, from a YAML file of `topd train`.

    Raises:
        TOPDError: it cannot be read, or holds what `topd train` would refuse.
    """
    import torch

    from topd.training.command import parse

    data, config, model = parse(["--config", file, *([] if torch.cuda.is_available() else ["--use_cpu", "true"])])
    return {
        "student": model.model_name_or_path,
        "teacher": config.teacher_model_name_or_path,
        "data": data.data,
        "split": data.data_split,
        "chat_template_kwargs": config.chat_template_kwargs or None,
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "window_length": [config.window_length],
        "share": config.candidate_share,
        "student_window": [config.student_window],
        "embedding": [config.embedding],
        "cost": [config.ground_cost],
        "seed": config.seed,
        "dtype": model.dtype,
    }
