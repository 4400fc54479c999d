"""The token loss: how far student and teacher are apart at each position, in nats.

The token loss of on-policy distillation is the full-vocabulary reverse KL at the student's own prefix (section 3)::

    KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v))

From logits it is two log-softmaxes. From hidden states and the models' output heads it is computed tile by tile, so
that tokens x vocabulary never exists at once: the first pass keeps the values, the backward pass recomputes each tile.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.utils.checkpoint
from jaxtyping import Float, Int
from torch import Tensor

Direction = Literal["reverse", "forward"]
"""reverse: KL(student || teacher), the token loss of OPD. forward: KL(teacher || student)."""


@dataclass(frozen=True)
class Head:
    """An output head: hidden states to logits, `softcap * tanh(scale * (h W^T + b) / softcap)`.

    Attributes:
        weight: [vocabulary, width].
        bias: [vocabulary] or None.
        scale: factor on the logits (1 / temperature goes here too where no softcap is set).
        softcap: bound of the logits (Gemma), or None.
        temperature: divides the final logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Logits in float32 at least (bf16 arithmetic on logits spoils the gradient of a small KL)."""
        logits = torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype))
        logits = logits.to(_at_least_float32(hidden)) * self.scale
        if self.bias is not None:
            logits = logits + self.bias * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def backward(self, logits: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to `h W^T + b`, from the gradient with respect to the logits."""
        if self.softcap is not None:
            grad = grad * (1 - (logits * self.temperature / self.softcap) ** 2)
        return grad * (self.scale / self.temperature)


def token_kl(
    student_logits: Float[Tensor, "*positions vocabulary"],
    teacher_logits: Float[Tensor, "*positions vocabulary"],
    direction: Direction = "reverse",
) -> Float[Tensor, "*positions"]:
    """Full-vocabulary KL at each position, in nats, differentiable in the student's logits.

    A token to which the first distribution gives probability 0 contributes 0.
    """
    student = torch.log_softmax(student_logits, dim=-1, dtype=_at_least_float32(student_logits))
    teacher = torch.log_softmax(teacher_logits, dim=-1, dtype=_at_least_float32(teacher_logits))
    first, second = (student, teacher) if direction == "reverse" else (teacher, student)
    gap = torch.where(first == -torch.inf, 0.0, first - second)
    return (first.exp() * gap).sum(dim=-1)


def token_nll(
    logits: Float[Tensor, "*positions vocabulary"], tokens: Int[Tensor, "*positions"]
) -> Float[Tensor, "*positions"]:
    """Negative log-likelihood of the given tokens, in nats: with the teacher's logits, the axis of Fig. 6."""
    return -torch.log_softmax(logits, dim=-1, dtype=_at_least_float32(logits)).gather(-1, tokens[..., None]).squeeze(-1)


def token_kl_from_hidden(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    direction: Direction = "reverse",
    tile_elements: int = 2**22,
) -> Float[Tensor, "positions"]:
    """`token_kl` of the two heads' logits without holding positions x vocabulary.

    Differentiable in the student's hidden states and in its head's weight and bias; the teacher is constant. At most
    `tile_elements` logits of each model exist at once. Values are float32 at least.
    """
    values: Tensor = _TiledKL.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_head.weight, student_head.bias, student_head, teacher_hidden, teacher_head, direction,
        tile_elements,
    )  # fmt: skip
    return values


class _TiledKL(torch.autograd.Function):
    """Two phases: values now, gradients tile by tile when their weights are known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        direction: Direction,
        tile_elements: int,
    ) -> Tensor:
        ctx.head, ctx.teacher_head, ctx.direction = head, teacher_head, direction
        ctx.tile = max(1, tile_elements // max(1, weight.shape[0]))
        values = hidden.new_empty(hidden.shape[0], dtype=_at_least_float32(hidden))
        for rows in _tiles(hidden.shape[0], ctx.tile):
            values[rows] = token_kl(head.logits(hidden[rows]), teacher_head.logits(teacher_hidden[rows]), direction)
        ctx.save_for_backward(hidden, teacher_hidden, values, weight, bias)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_values,) = grads
        hidden, teacher_hidden, values, weight, bias = ctx.saved_tensors
        head: Head = replace(ctx.head, weight=weight, bias=bias)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(head.weight, dtype=values.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(head.weight[:, 0], dtype=values.dtype) if ctx.needs_input_grad[2] else None
        for rows in _tiles(hidden.shape[0], ctx.tile):
            logits = head.logits(hidden[rows])
            student = torch.log_softmax(logits, dim=-1)
            teacher = torch.log_softmax(ctx.teacher_head.logits(teacher_hidden[rows]), dim=-1)
            if ctx.direction == "reverse":  # d KL(S||T) / d logit_v = p_S(v) (log p_S(v) - log p_T(v) - KL)
                gap = torch.where(student == -torch.inf, 0.0, student - teacher)
                grad_logits = student.exp() * (gap - values[rows, None])
            else:  # d KL(T||S) / d logit_v = p_S(v) - p_T(v)
                grad_logits = student.exp() - teacher.exp()
            grad_raw = head.backward(logits, grad_logits * grad_values[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_raw @ head.weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad_raw.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad_raw.sum(dim=0, dtype=values.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(head.weight.dtype)
        if grad_bias is not None and head.bias is not None:
            grad_bias = grad_bias.to(head.bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


class TokenScores(NamedTuple):
    """What one pass without gradients says of each token, in nats.

    Attributes:
        kl: [position] the token loss (reverse KL unless asked otherwise).
        teacher_nll: [position] negative log-likelihood of the sampled token under the teacher.
        entropy: [position] of the student's distribution.
    """

    kl: Float[Tensor, "positions"]
    teacher_nll: Float[Tensor, "positions"]
    entropy: Float[Tensor, "positions"]


@torch.no_grad()
def score_tokens(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    tokens: Int[Tensor, "positions"],
    direction: Direction = "reverse",
    tile_elements: int = 2**22,
) -> TokenScores:
    """Score sampled tokens tile by tile, each model's logits computed once."""
    values = student_hidden.new_zeros(3, len(tokens), dtype=_at_least_float32(student_hidden))
    for rows in _tiles(len(tokens), max(1, tile_elements // max(1, student_head.weight.shape[0]))):
        student_logits, teacher_logits = (
            student_head.logits(student_hidden[rows]),
            teacher_head.logits(teacher_hidden[rows]),
        )
        values[0, rows] = token_kl(student_logits, teacher_logits, direction)
        values[1, rows] = token_nll(teacher_logits, tokens[rows])
        values[2, rows] = torch.special.entr(student_logits.softmax(-1)).sum(-1)
    return TokenScores(*values)


def gathered_log_probs(
    hidden: Float[Tensor, "positions width"],
    head: Head,
    tokens: Int[Tensor, "positions wanted"],
    tile_elements: int = 2**22,
) -> Float[Tensor, "positions wanted"]:
    """log p(token | position) of a few wanted tokens at each position, in nats, differentiable, tile by tile.

    Only positions x wanted values are kept; a tile's logits are recomputed in the backward pass.
    """
    if hidden.shape[0] == 0:
        return hidden.new_zeros(tokens.shape, dtype=_at_least_float32(hidden))

    def tile_log_probs(tile: Tensor, wanted: Tensor) -> Tensor:
        logits = head.logits(tile)
        return logits.gather(-1, wanted) - logits.logsumexp(dim=-1, keepdim=True)

    size = max(1, tile_elements // max(1, head.weight.shape[0]))
    tiles = [
        torch.utils.checkpoint.checkpoint(tile_log_probs, hidden[rows], tokens[rows], use_reentrant=False)
        for rows in _tiles(hidden.shape[0], size)
    ]
    return torch.cat(tiles)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
