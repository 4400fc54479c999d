"""The ladder's levels: which tasks, how many problems, how large the two models are, how long they learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A model and its training: AdamW (betas 0.9, 0.98), cosine, cross-entropy on the solutions' tokens.

    Attributes:
        width, layers: of a Qwen3 with tied embeddings; heads of 32 or 64, an MLP twice as wide.
        problems: solutions that it is trained on, each for `epochs` times.
    """

    width: int
    layers: int
    problems: int
    epochs: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Level:
    """A pair and its tasks.

    Attributes:
        tasks: by name of reasoning-gym's dataset, its settings.
        prompts, held_out, tuning: how many of each `topd study` finds in the folder.
    """

    tasks: dict[str, dict[str, Any]]
    teacher: Recipe
    student: Recipe
    prompts: int = 20_000
    held_out: int = 2000
    tuning: int = 1000


LEVELS = {
    # On a CPU, one thread each: the teacher 36 minutes, the student 20, beside other jobs.
    "small": Level(
        tasks={
            "chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1},
            "gcd": {"max_value": 40},
            "simple_equations": {"max_terms": 2, "max_value": 9, "operators_weights": [0.5, 0.5, 0.0]},
        },
        teacher=Recipe(width=160, layers=4, problems=90_000, epochs=2, batch=96, learning_rate=2e-3),
        student=Recipe(width=128, layers=4, problems=90_000, epochs=2, batch=96, learning_rate=2e-3),
    ),
    # For one GPU; an estimate of ten minutes, not run yet.
    "large": Level(
        tasks={
            "chain_sum": {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 4},
            "basic_arithmetic": {
                "min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 2, "operators": ["+", "-", "*"],
                "allow_negation": False,
            },
            "gcd": {"max_value": 1000},
            "products": {"min_digits": 2, "max_digits": 3},
            "simple_equations": {"max_terms": 3, "max_value": 50, "operators_weights": [0.5, 0.5, 0.0]},
            "leg_counting": {"min_animals": 3, "max_animals": 8, "max_instances": 15},
        },
        teacher=Recipe(width=768, layers=16, problems=400_000, epochs=2, batch=256, learning_rate=6e-4),
        student=Recipe(width=384, layers=14, problems=400_000, epochs=1, batch=256, learning_rate=1e-3),
    ),
}  # fmt: skip
