"""From hidden states to the vocabulary: output heads, and tiles of positions x vocabulary for computing losses.

All tiles share two buffers. Logits become log-probabilities, then probabilities and the gradient of the logits, in
place. `Tiles.collect` converts that gradient to those of hidden states and head, and sums them over tiles. Autograd is
not involved. Logits are at least float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Direction = Literal["reverse", "forward"]
"""reverse: KL(student || teacher), the token loss of OPD. forward: KL(teacher || student)."""
SLICE_ELEMENTS = 2**20
"""Number of weights to cast at once on devices that cannot multiply 16-bit matrices into a float32 result."""


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype of logits and losses for hidden states of this dtype."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Head:
    """An output head: hidden states to logits, `softcap * tanh(scale * (h W^T + b) / softcap) / temperature`.

    Attributes:
        weight: [vocabulary, width]; converted to the dtype of the hidden states.
        bias: [vocabulary] or None.
        scale: factor on the logits. Without a softcap, 1 / temperature has the same effect.
        softcap: bound of the logits (Gemma), or None.
        temperature: divisor of the final logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Logits, differentiable. For bf16 states the logits are float32 and never rounded to bf16: that rounding alone
        changes the gradient of a small KL by 3 to 25 %."""
        dtype = at_least_float32(hidden)
        logits = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(hidden.dtype).to(dtype))
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def write_logits(
        self, hidden: Float[Tensor, "positions width"], out: Float[Tensor, "positions vocabulary"]
    ) -> Float[Tensor, "positions vocabulary"]:
        """Write `logits` to `out`, at least float32; no autograd, no temporary tile, no float32 copy of the weights."""
        if hidden.dtype == self.weight.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        elif hidden.is_cuda and hidden.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            rows = max(1, SLICE_ELEMENTS // max(1, hidden.shape[1]))
            states, buffer = hidden.to(out.dtype), out.new_empty(min(rows, out.shape[1]), hidden.shape[1])
            for part, columns in zip(torch.split(self.weight, rows), torch.split(out, rows, dim=1), strict=True):
                torch.mm(states, buffer[: len(part)].copy_(part.to(hidden.dtype)).T, out=columns)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out if self.scale == self.temperature else out.mul_(self.scale / self.temperature)

    def backward(self, logits: Tensor | None, grad: Tensor) -> Tensor:
        """Convert the gradient of the logits to that of `h W^T + b`. Overwrites both arguments.

        `logits` are needed only with a softcap.
        """
        if self.softcap is not None and logits is not None:  # 1 - tanh^2
            grad.mul_(logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1))
        return grad if self.scale == self.temperature else grad.mul_(self.scale / self.temperature)


def converted(head: Head, hidden: Tensor) -> Head:
    """The head with constant weights in the dtype of the hidden states: once for many tiles."""
    return replace(head, weight=head.weight.detach().to(hidden.dtype))


class LikelihoodTerms(NamedTuple):
    """The sum over k of `weight_k * -log p_S(token_k | position_k)`, in nats.

    Attributes:
        position: [term] row of the hidden states. A row may have any number of terms, also equal ones.
        token: [term] token id.
        weight: [term] constant.
    """

    position: Int[Tensor, "term"]
    token: Int[Tensor, "term"]
    weight: Float[Tensor, "term"]


class Tiles:
    """The buffers and gradients of one call.

    Attributes:
        student: buffer [row, vocabulary]: the student's log-probabilities, then its probabilities.
        other: second buffer: the teacher's log-probabilities, then the gradient of the logits.
        grads: gradients of hidden states, weight and bias, summed by `collect`; None if not needed. Those of weight and
            bias are float32 at least.
        dtypes: those of hidden states, weight and bias.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "positions student_width"],
        head: Head,
        tile_elements: int | None,
        needs_grad: tuple[bool, bool, bool] = (False, False, False),
        two: bool = True,
    ) -> None:
        self.hidden = hidden
        self.dtypes = hidden.dtype, head.weight.dtype, hidden.dtype if head.bias is None else head.bias.dtype
        self.head = converted(head, hidden)
        vocabulary, dtype = head.weight.shape[0], at_least_float32(hidden)
        self.size = min(tile_rows(vocabulary, tile_elements, hidden.device), max(1, len(hidden)))
        self.student = hidden.new_empty(self.size, vocabulary, dtype=dtype)
        self.other = torch.empty_like(self.student) if two else self.student
        self.capped_logits = torch.empty_like(self.student) if head.softcap is not None and any(needs_grad) else None
        in_hidden, in_weight, in_bias = needs_grad
        self.grads = (
            torch.zeros_like(hidden) if in_hidden else None,
            hidden.new_zeros(head.weight.shape, dtype=dtype) if in_weight else None,
            hidden.new_zeros(vocabulary, dtype=dtype) if in_bias else None,
        )

    def split(self, positions: int) -> tuple[Tensor, ...]:
        """The rows of each tile."""
        return torch.split(torch.arange(positions, device=self.hidden.device), self.size) if positions else ()

    def log_probs(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row vocabulary"]:
        """Compute the student's log-probabilities, in `student`."""
        logits = self.head.write_logits(self.hidden[rows], self.student[: len(rows)])
        if self.capped_logits is not None:
            self.capped_logits[: len(rows)].copy_(logits)
        return log_softmax_(logits)

    def divergence(
        self,
        rows: Int[Tensor, "row"],
        teacher_hidden: Float[Tensor, "teacher_positions teacher_width"],
        teacher_head: Head,
        direction: Direction,
    ) -> Float[Tensor, "row"]:
        """KL at each row, in nats. Call `log_probs` first. Leaves p_S in `student` and d KL / d logits in `other`."""
        teacher = log_softmax_(teacher_head.write_logits(teacher_hidden[rows], self.gradient(rows)))
        return divergence_(self.student[: len(rows)], teacher, direction, may_mask(self.head, teacher_head))

    def gradient(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row vocabulary"]:
        """The part of `other` that these rows use."""
        return self.other[: len(rows)]

    def collect(self, rows: Int[Tensor, "row"]) -> None:
        """Add the gradients that follow from the gradient of the logits in `other`. Overwrites `student`."""
        logits = None if self.capped_logits is None else self.capped_logits[: len(rows)]
        grad = self.head.backward(logits, self.gradient(rows))
        hidden = self.hidden[rows]
        in_hidden, in_weight, in_bias = self.grads
        narrow = grad
        if grad.dtype != hidden.dtype:  # reuse the memory of the probabilities for the bf16 gradient
            narrow = self.student.view(-1).view(hidden.dtype)[: grad.numel()].view(grad.shape).copy_(grad)
        if in_hidden is not None:
            in_hidden[rows] = narrow @ self.head.weight
        if in_weight is not None:
            if hidden.is_cuda and narrow is not grad:
                torch.addmm(in_weight, narrow.T, hidden, out_dtype=in_weight.dtype, out=in_weight)
            else:
                in_weight.addmm_(grad.T, hidden.to(grad.dtype))
        if in_bias is not None:
            in_bias += grad.sum(dim=0)


def in_dtypes(gradients: Iterable[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Each gradient in its dtype; None where it is not needed."""
    return [None if grad is None else grad.to(dtype) for grad, dtype in zip(gradients, dtypes, strict=True)]


def tile_rows(vocabulary: int, tile_elements: int | None, device: torch.device) -> int:
    """Rows per tile: as many as fit in `tile_elements` logits, or the default."""
    if tile_elements is not None:
        return max(1, tile_elements // max(1, vocabulary))
    # Each tile reads the weights of both heads, so it needs many rows. On a CPU, with 8k to 152k tokens, 64 rows take
    # 15 to 20 % less time than 32 and 10 % more than 128, and use 2 x 39 MB at 152k. A GPU needs more rows to be busy.
    # With a small vocabulary call overhead dominates: 2^20 logits.
    return max(64 if device.type == "cpu" else 1024, 2**20 // max(1, vocabulary))


def log_softmax_(logits: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row vocabulary"]:
    return torch.log_softmax(logits, dim=-1, out=logits)


def divergence_(
    student: Float[Tensor, "row vocabulary"],
    teacher: Float[Tensor, "row vocabulary"],
    direction: Direction,
    masked: bool,
) -> Float[Tensor, "row"]:
    """KL of each row's log-probabilities, in nats.

    Leaves p_S in `student`, and the gradient of the student's logits in `teacher`. `masked`: log-probabilities may be
    -inf (0 log 0 = 0).
    """
    if direction == "reverse":  # KL = sum_v p_S (log p_S - log p_T);  d KL / d z_v = p_S (log p_S - log p_T - KL)
        terms = torch.sub(student, teacher, out=teacher)
        first = student.exp_()
    else:  # KL = sum_v p_T (log p_T - log p_S);  d KL / d z_v = p_S - p_T
        terms = teacher - student
        first = teacher.exp_()
    if masked:
        terms.masked_fill_(first == 0, 0)
    kl = terms.mul_(first).sum(-1)
    if direction == "reverse":
        terms.addcmul_(first, kl[:, None], value=-1)
    else:
        torch.sub(student.exp_(), teacher, out=teacher)
    return kl


def add_likelihood_(
    grad: Float[Tensor, "row vocabulary"], probs: Float[Tensor, "row vocabulary"], terms: LikelihoodTerms
) -> None:
    """Add d / d z_v = sum_k weight_k (p_S(v) - [v = token_k]) at each row. `terms.position` are rows of the tile."""
    total = grad.new_zeros(len(grad)).index_add_(0, terms.position, terms.weight)
    grad.addcmul_(probs, total[:, None])
    grad.index_put_((terms.position, terms.token), -terms.weight, accumulate=True)


def may_mask(*heads: Head) -> bool:
    """Whether a logit can be -inf: only through a bias."""
    return any(head.bias is not None for head in heads)


def check_vocabularies(student: Head, teacher: Head) -> None:
    if student.weight.shape[0] != teacher.weight.shape[0]:
        sizes = f"{student.weight.shape[0]} and {teacher.weight.shape[0]} tokens"
        raise RuntimeError(f"student and teacher must share a vocabulary, but their heads have {sizes}")


def check_choice(name: str, value: str, allowed: Any) -> None:
    """Raise `ValueError` unless the value is one of a `Literal`'s."""
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}.")


def check_rows(**parts: Tensor) -> None:
    """Raise `ValueError` unless all have the same number of positions, their first axis."""
    if len({len(part) for part in parts.values()}) > 1:
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
        raise ValueError(f"All need one row per position; their shapes are {shapes}.")
