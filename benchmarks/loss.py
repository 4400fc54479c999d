"""The token loss: forward and backward, from hidden states and output heads to the student's gradients, float32.

Every side computes the mean reverse KL over T positions and its gradients with respect to the student's hidden states
(width 256) and head weight [V, 256]; the teacher (width 320) is constant. Sides:

- ours: `topd.algorithm.distillation_loss` with weights 1/T.
- naive: both heads' logits, two log-softmaxes, `kl_div`, autograd: the form of TRL's GKD.
- TRL: `trl.kernels.chunked_divergence.ChunkedDivergenceFunction`, called as `DistillationTrainer` does; on a CPU that
  is its torch fallback, not its Triton kernels.
- Liger: `LigerFusedLinearJSDLoss`, beta 1, soft loss only, not compiled, its default chunk of 1024 positions.

Parity before timing: loss and both gradients beside naive. Memory: the peak of one call over what was there before it
(inputs), each side in a fresh process; it includes the gradients, which every side must return. The memory gates hold
where T x V is at least 2**24 logits (64 MiB); below, a whole problem is not much more than one of our tiles, and the
row is informative. Flat in T: our peak at 4096 positions less the bytes of the gradients, beside the same at 512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from benchmarks import Size
from benchmarks.environment import installed, say
from benchmarks.measure import interleave, peak_memory, relative_difference, require
from benchmarks.row import Row, memory_row, missing_row, time_row
from topd.algorithm import Head, distillation_loss

WIDTH, TEACHER_WIDTH = 256, 320
TIME_GATE, NAIVE_MEMORY_GATE, TRL_MEMORY_GATE, FLAT_GATE = 1.1, 0.25, 0.2, 1.2
GATED_LOGITS = 2**24
WHAT = "mean reverse KL and its gradients from hidden states and heads, float32"

# (vocabulary, positions): timed; and measured for memory in fresh processes.
TIMED: dict[Size, list[tuple[int, int]]] = {
    "tiny": [(512, 32)],
    "quick": [(8192, 1024), (32768, 512)],
    "full": [(8192, 512), (8192, 4096), (32768, 512), (32768, 1024), (151936, 512)],
}
MEMORY: dict[Size, list[tuple[int, int]]] = {
    "tiny": [(512, 32)],
    "quick": [(32768, 1024)],
    "full": [(8192, 4096), (32768, 512), (32768, 1024), (32768, 4096), (151936, 512)],
}
FLAT: dict[Size, list[tuple[int, int, int]]] = {
    "tiny": [],
    "quick": [(8192, 512, 4096)],
    "full": [(8192, 512, 4096), (32768, 512, 4096)],
}
REPEATS: dict[Size, int] = {"tiny": 1, "quick": 3, "full": 5}


class Problem(NamedTuple):
    """Leaves `hidden` and `weight` are the student's."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def random_problem(vocabulary: int, positions: int) -> Problem:
    """Logits of standard deviation 1.5 or so, each model its own: a few nats of KL."""
    generator = torch.Generator().manual_seed(vocabulary + positions)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return torch.randn(rows, width, generator=generator).mul_(scale)

    return Problem(
        normal(positions, WIDTH, 1.0).requires_grad_(),
        normal(vocabulary, WIDTH, 1.5 * WIDTH**-0.5).requires_grad_(),
        normal(positions, TEACHER_WIDTH, 1.0),
        normal(vocabulary, TEACHER_WIDTH, 1.5 * TEACHER_WIDTH**-0.5),
    )


def ours(p: Problem) -> Tensor:
    weights = torch.full((len(p.hidden),), 1 / len(p.hidden))
    return distillation_loss(p.hidden, Head(p.weight), p.teacher_hidden, Head(p.teacher_weight), weights).loss


def naive(p: Problem) -> Tensor:
    student = log_softmax(p.hidden @ p.weight.T, dim=-1)
    with torch.no_grad():
        teacher = log_softmax(p.teacher_hidden @ p.teacher_weight.T, dim=-1)
    return kl_div(teacher, student, reduction="none", log_target=True).sum() / len(p.hidden)


def trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, 1.0, 1.0, 1.0, None, 1.0, None
    )
    return divergence.sum() / len(p.hidden)


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    targets = torch.zeros(len(p.hidden), dtype=torch.long)  # none is to be ignored
    return loss(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, targets)


SIDES: dict[str, Callable[[Problem], Tensor]] = {"ours": ours, "naive": naive, "TRL": trl, "Liger": liger}


def sides_here() -> list[str]:
    """The sides that can run here."""
    return [side for side in SIDES if side != "Liger" or installed("liger_kernel.chunked_loss.jsd_loss")]


def step(loss: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, then its gradients in the hidden states and in the head."""
    value = loss(problem)
    in_hidden, in_weight = torch.autograd.grad(value, (problem.hidden, problem.weight))
    return value.detach(), in_hidden, in_weight


def prepare(side: str, vocabulary: int, positions: int) -> Callable[[], object]:
    """For `peak_memory`. A first call on a small problem imports and initialises what a first call does."""
    problem = random_problem(vocabulary, positions)
    step(SIDES[side], random_problem(64, 8))
    return partial(step, SIDES[side], problem)


def rows(size: Size) -> Iterable[Row]:
    sides = sides_here()
    if "Liger" not in sides:
        yield missing_row("loss", "Liger", "--no-deps liger-kernel==0.8.5", what=WHAT)
    for vocabulary, positions in TIMED[size]:
        say(f"loss: time, V={vocabulary} T={positions}")
        yield from _times(vocabulary, positions, sides, REPEATS[size])
    for vocabulary, positions in MEMORY[size]:
        say(f"loss: memory, V={vocabulary} T={positions}")
        yield from _memory(vocabulary, positions, sides)
    for vocabulary, few, many in FLAT[size]:
        yield _flat(vocabulary, few, many)


def _times(vocabulary: int, positions: int, sides: list[str], repeats: int) -> Iterator[Row]:
    problem = random_problem(vocabulary, positions)
    calls = {side: partial(step, SIDES[side], problem) for side in sides}
    parity = check_parity(calls)
    timing = interleave(calls, repeats, warmup=0)  # the parity check called each once
    for side in sides[1:]:
        gate = TIME_GATE if side == "naive" else None
        yield time_row(
            "loss", side, timing, size=f"V={vocabulary} T={positions}", what=WHAT, gate=gate, parity=parity[side]
        )


def check_parity(calls: Mapping[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, str]:
    """What each side but naive differs by from naive, in words; naive's entry is ours. One side at a time in memory."""
    reference = calls["naive"]()
    words = {}
    for side, call in calls.items():
        if side != "naive":
            limits = {"loss": 1e-5, "grad hidden": 1e-4, "grad head": 1e-4}
            values = zip(limits.items(), call(), reference, strict=True)
            words[side] = ", ".join(
                require(f"{side}: {name}", relative_difference(a, b), limit) for (name, limit), a, b in values
            )
    return words | {"naive": words["ours"]}


def _memory(vocabulary: int, positions: int, sides: list[str]) -> Iterator[Row]:
    peaks = {side: peak_memory("benchmarks.loss:prepare", side, vocabulary, positions) for side in sides}
    gates = {"naive": NAIVE_MEMORY_GATE, "TRL": TRL_MEMORY_GATE}
    for side in sides[1:]:
        gate = gates.get(side) if vocabulary * positions >= GATED_LOGITS else None
        yield memory_row("loss", side, peaks, size=f"V={vocabulary} T={positions}", what=WHAT, gate=gate)


def _flat(vocabulary: int, few: int, many: int) -> Row:
    """Our peak at `many` positions less the gradients, over the same at `few`."""
    say(f"loss: memory flat in T, V={vocabulary}")
    peaks = {n: peak_memory("benchmarks.loss:prepare", "ours", vocabulary, n) for n in (few, many)}
    less = {n: peak - 4 * WIDTH * (n + vocabulary) for n, peak in peaks.items()}
    slope = (peaks[many] - peaks[few]) / (many - few)
    return Row(
        "loss", f"ours at T={few}", "peak memory less gradients", f"V={vocabulary} T={many}", WHAT,
        ratio=less[many] / less[few], gate=FLAT_GATE, bytes={"ours": less[many], "beside": less[few]}, repeats=1,
        note=f"{slope:.0f} bytes a token more, of which {4 * WIDTH} are the gradient of its hidden state",
    )  # fmt: skip
