"""Precision of the loss's gradient with bf16 hidden states and heads, at a mean KL of about 0.005, 0.05 and 0.5.

The sides are those of the case `loss`, on the same bf16 inputs, widths 256 and 320; nothing is timed. The reference is
the naive form in float64 on those same inputs, so that only what a side does with them counts. The error is
|gradient - reference| / |reference| of the hidden states' gradient and of the head's, the larger of the two. "naive"
takes logits as the product leaves them, in bf16, and the log-softmax in float32, as models do.

Gradients are returned in bf16, so no side can do better than that rounding, some 0.0017.

Student and teacher agree but for the teacher's 64 additional channels, whose scale sets the KL.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from benchmarks import Size
from benchmarks.loss import SIDES, TEACHER_WIDTH, WIDTH, Problem, naive, sides_here, step
from benchmarks.measure import relative_difference
from benchmarks.row import Row, missing_row

GATE = 0.003
MEAN_KL = (0.005, 0.05, 0.5)
SIZES: dict[Size, tuple[int, int]] = {"tiny": (512, 32), "quick": (8192, 128), "full": (32768, 256)}
WHAT = "error of the gradient from bf16 inputs, beside a float64 reference"


def close_problem(vocabulary: int, positions: int, scale: float) -> Problem:
    """In bf16; `scale` is the standard deviation of the logits' difference."""
    generator = torch.Generator().manual_seed(0)
    more = TEACHER_WIDTH - WIDTH

    def normal(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator)

    hidden, weight = normal(positions, WIDTH), normal(vocabulary, WIDTH) * (2 * WIDTH**-0.5)
    teacher_hidden = torch.cat([hidden, normal(positions, more)], dim=1)
    teacher_weight = torch.cat([weight, normal(vocabulary, more) * (scale * more**-0.5)], dim=1)
    student, head, *teacher = (each.bfloat16() for each in (hidden, weight, teacher_hidden, teacher_weight))
    return Problem(student.requires_grad_(), head.requires_grad_(), *teacher)


def float64(problem: Problem) -> Problem:
    student, head, *teacher = (each.detach().double() for each in problem)
    return Problem(student.requires_grad_(), head.requires_grad_(), *teacher)


def rounded(p: Problem) -> Tensor:
    """The naive form as models do it: bf16 logits, float32 log-softmax."""
    student = log_softmax((p.hidden @ p.weight.T).float(), dim=-1)
    with torch.no_grad():
        teacher = log_softmax((p.teacher_hidden @ p.teacher_weight.T).float(), dim=-1)
    return kl_div(teacher, student, reduction="none", log_target=True).sum() / len(p.hidden)


def errors(vocabulary: int, positions: int, scale: float, sides: Iterable[str]) -> tuple[float, dict[str, float]]:
    """The reference's mean KL, and each side's error."""
    problem = close_problem(vocabulary, positions, scale)
    kl, *reference = step(naive, float64(problem))
    found = {}
    for side in sides:
        _, *gradients = step(rounded if side == "naive" else SIDES[side], problem)
        found[side] = max(relative_difference(a, b) for a, b in zip(gradients, reference, strict=True))
    return float(kl), found


def rows(size: Size) -> Iterable[Row]:
    vocabulary, positions = SIZES[size]
    sides = sides_here()
    if "Liger" not in sides:
        yield missing_row("gradient", "Liger", "--no-deps liger-kernel==0.8.5", measure="gradient error", what=WHAT)
    for target in MEAN_KL:
        kl, found = errors(vocabulary, positions, (2 * target) ** 0.5, sides)  # KL = variance / 2, for small ones
        words = f"V={vocabulary} T={positions} KL={kl:.3g}"
        ours = found.pop("ours")
        yield Row(
            "gradient", "float64", "gradient error", words, WHAT, ratio=ours, gate=GATE, repeats=1,
            errors={"ours": ours, "beside": 0.0}, note="the ratio is our relative error itself",
        )  # fmt: skip
        for side, error in found.items():
            sides_errors = {"ours": ours, "beside": error}
            yield Row("gradient", side, "gradient error", words, WHAT, ours / error, errors=sides_errors, repeats=1)
