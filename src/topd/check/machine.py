"""Precision and disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from topd.check.finding import Finding, ok
from topd.check.memory import autocasts, in_words, shape, sharded, stored_dtype
from topd.check.setup import Setup
from topd.loading.precision import REMEDY, lost_in_rounding


def precision(setup: Setup) -> Finding:
    """Do the optimizer's steps survive the rounding of the student's weights?"""
    config = setup.config
    stored = {model.role: stored_dtype(model, setup.dtypes[model.role]) for model in setup.pair}
    computed = "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "as stored"
    if not autocasts(setup):
        computed = "as stored" + (" (TRL's loss does not autocast; opd_loss=one_pass does)" if config.bf16 else "")
    found = f"weights {stored['student']} (student), {stored['teacher']} (teacher); computed {computed}"
    if config.bf16 and sharded() and stored["student"] != "float32":
        return ok("precision", f"{found}; sharded training keeps float32 weights of the student")
    lost = lost_in_rounding(stored["student"], config.learning_rate)
    if lost is not None and not setup.adapters:
        return Finding("precision", "warning", f"{found}. {lost}", REMEDY)
    return ok("precision", found)


def disk(setup: Setup) -> Finding:
    """Room for the checkpoints: weights and two values of the optimizer each."""
    config = setup.config
    student = shape(setup.student, setup.dtypes["student"])
    one = student.weights * (0.03 if setup.adapters else 3)
    steps = config.max_steps if config.max_steps > 0 else None
    kept = (
        config.save_total_limit or (steps and config.save_steps >= 1 and max(1, round(steps / config.save_steps))) or 1
    )
    folder = Path(str(config.output_dir)).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding(
            "disk", "error", f"nothing can be written into {config.output_dir}: {folder} is no folder, or not yours",
            "Name another --output_dir, or change its permissions.",
        )  # fmt: skip
    free = shutil.disk_usage(folder).free
    needed = one * (kept + 1)  # a new one is written before an old one goes
    found = (
        f"a checkpoint takes about {in_words(one)}, {kept} and one being written {in_words(needed)}; "
        f"{in_words(free)} free"
    )
    if needed > free:
        return Finding(
            "disk", "error" if 2 * one > free else "warning", found,
            "--save_total_limit 2, a larger --save_steps, or another --output_dir.",
        )  # fmt: skip
    return ok("disk", found)
