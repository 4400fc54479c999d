"""Precision and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from topd.preflight.finding import Finding, ok
from topd.preflight.memory import in_words, shape, stored_dtype
from topd.preflight.setup import Setup

WEIGHT = 0.02
"""Size of a usual weight."""


def precision(setup: Setup) -> Finding:
    """Do the optimizer's steps survive the rounding of the student's weights?

    A weight of 0.02 in bfloat16 is 0.00012 from the next one: an update of less than half of that is rounded away, and
    AdamW moves a weight by about the learning rate.
    """
    config = setup.config
    stored = {model.role: stored_dtype(model, setup.dtypes[model.role]) for model in setup.pair}
    computed = "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "as stored"
    found = f"weights {stored['student']} (student), {stored['teacher']} (teacher); computed {computed}"
    least = WEIGHT * {"bfloat16": 2**-9, "float16": 2**-12}.get(stored["student"], 2**-25)
    if config.learning_rate < least and not setup.adapters:
        return Finding(
            "precision", "warning",
            f"{found}. A learning rate of {config.learning_rate:g} is lost in rounding: weights near {WEIGHT} need "
            f"{least:.0e} to move at all",
            "--dtype float32 --bf16 true keeps the student's weights in float32 and computes in bfloat16; "
            '--teacher_model_init_kwargs \'{"dtype": "bfloat16"}\' keeps the teacher small.',
        )  # fmt: skip
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
