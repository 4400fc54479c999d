"""The token loss: how far student and teacher are apart at each position, in nats.

The token loss of on-policy distillation is the full-vocabulary reverse KL at the student's own prefix (section 3):

    KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v))

From logits it is two log-softmaxes. From hidden states and the models' output heads it is computed tile by tile, so
that tokens x vocabulary never exists at once. Here are the definitions and what has two phases, values first and
gradients when their weights are known; `distillation_loss` knows the weights beforehand and needs one.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topd.algorithm.head import Head, at_least_float32
from topd.algorithm.tiles import Direction as Direction
from topd.algorithm.tiles import (
    LikelihoodTerms,
    Tiles,
    add_likelihood_,
    check_vocabularies,
    divergence_,
    log_softmax_,
    may_mask,
)


def token_kl(
    student_logits: Float[Tensor, "*positions vocabulary"],
    teacher_logits: Float[Tensor, "*positions vocabulary"],
    direction: Direction = "reverse",
) -> Float[Tensor, "*positions"]:
    """Full-vocabulary KL at each position, in nats, differentiable in the student's logits.

    A token to which the first distribution gives probability 0 contributes 0.

    Args:
        student_logits: before the softmax; -inf where the student cannot go.
        teacher_logits: of the same vocabulary, in the same context. Logits of 16 bits are taken as float32.
        direction: reverse, KL(student || teacher): the token loss (section 3). forward, KL(teacher || student).
    """
    student = torch.log_softmax(student_logits, dim=-1, dtype=at_least_float32(student_logits))
    teacher = torch.log_softmax(teacher_logits, dim=-1, dtype=at_least_float32(teacher_logits))
    first, second = (student, teacher) if direction == "reverse" else (teacher, student)
    gap = torch.where(first == -torch.inf, 0.0, first - second)
    return (first.exp() * gap).sum(dim=-1)


def token_nll(
    logits: Float[Tensor, "*positions vocabulary"], tokens: Int[Tensor, "*positions"]
) -> Float[Tensor, "*positions"]:
    """-log p(token) of the given tokens, in nats, differentiable: with the teacher's logits, the axis of Fig. 6."""
    return -torch.log_softmax(logits, dim=-1, dtype=at_least_float32(logits)).gather(-1, tokens[..., None]).squeeze(-1)


def token_kl_from_hidden(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    direction: Direction = "reverse",
    tile_elements: int | None = None,
) -> Float[Tensor, "positions"]:
    """`token_kl` of the two heads' logits without holding positions x vocabulary.

    Differentiable in the student's hidden states and in its head's weight and bias; the teacher is constant. At most
    `tile_elements` logits of each model (one row at least; chosen if None) exist at once. Values are float32 at least.

    Args:
        student_hidden: last hidden states from which the tokens are predicted.
        student_head: from states to logits.
        teacher_hidden: the teacher's, of any width, in the same contexts.
        teacher_head: its head; as many rows as the student's.
        direction: as in `token_kl`.
        tile_elements: see above.

    Raises:
        RuntimeError: the heads' vocabularies differ in size.
    """
    check_vocabularies(student_head, teacher_head)
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
        tile_elements: int | None,
    ) -> Tensor:
        ctx.head, ctx.teacher_head, ctx.direction, ctx.tile_elements = head, teacher_head, direction, tile_elements
        ctx.save_for_backward(hidden, teacher_hidden, weight, bias)
        tiles = Tiles(hidden, head, tile_elements)
        values = hidden.new_empty(hidden.shape[0], dtype=at_least_float32(hidden))
        for rows in tiles.split(len(hidden)):
            tiles.log_probs(rows)
            values[rows] = tiles.divergence(rows, teacher_hidden, teacher_head, direction)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, teacher_hidden, weight, bias = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        tiles = Tiles(hidden, head, ctx.tile_elements, ctx.needs_input_grad[:3])
        for rows in tiles.split(len(hidden)):
            tiles.log_probs(rows)
            tiles.divergence(rows, teacher_hidden, ctx.teacher_head, ctx.direction)
            tiles.gradient(rows).mul_(grads[0][rows, None])
            tiles.collect(rows)
        return (*tiles.gradients(), None, None, None, None, None)


class TokenScores(NamedTuple):
    """What one pass without gradients says of each token, in nats.

    Attributes:
        kl: [position] the token loss (reverse KL unless asked otherwise).
        teacher_nll: [position] negative log-likelihood of the sampled token under the teacher.
        student_nll: [position] the same under the student; teacher_nll - student_nll is k1, log p_S - log p_T.
        entropy: [position] of the student's distribution.
        student_greedy: [position] the student's most likely token; the first of equals.
        teacher_greedy: [position] the teacher's.
    """

    kl: Float[Tensor, "positions"]
    teacher_nll: Float[Tensor, "positions"]
    student_nll: Float[Tensor, "positions"]
    entropy: Float[Tensor, "positions"]
    student_greedy: Int[Tensor, "positions"]
    teacher_greedy: Int[Tensor, "positions"]


@torch.no_grad()
def score_tokens(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    tokens: Int[Tensor, "positions"],
    direction: Direction = "reverse",
    tile_elements: int | None = None,
) -> TokenScores:
    """Score sampled tokens tile by tile, each model's logits computed once. No gradients.

    Args:
        student_hidden: last hidden states from which the tokens are predicted.
        student_head: from states to logits.
        teacher_hidden: the teacher's, in the same contexts.
        teacher_head: its head; as many rows as the student's.
        tokens: that were sampled.
        direction: of `TokenScores.kl`, as in `token_kl`.
        tile_elements: logits of each model that exist at once; chosen if None.

    Raises:
        RuntimeError: the heads' vocabularies differ in size.
    """
    check_vocabularies(student_head, teacher_head)
    tiles = Tiles(student_hidden, student_head, tile_elements)
    kl, teacher_nll, student_nll, entropy = student_hidden.new_zeros(4, len(tokens), dtype=tiles.student.dtype)
    student_greedy, teacher_greedy = tokens.new_zeros(2, len(tokens), dtype=torch.long)
    masked = may_mask(student_head, teacher_head)
    for rows in tiles.split(len(tokens)):
        student, teacher = tiles.student[: len(rows)], tiles.other[: len(rows)]
        student_greedy[rows] = student_head.write_logits(student_hidden[rows], student).argmax(-1)
        teacher_greedy[rows] = teacher_head.write_logits(teacher_hidden[rows], teacher).argmax(-1)
        log_softmax_(student)
        log_softmax_(teacher)
        teacher_nll[rows] = -teacher.gather(-1, tokens[rows, None]).squeeze(-1)
        student_nll[rows] = -student.gather(-1, tokens[rows, None]).squeeze(-1)
        kl[rows] = divergence_(student, teacher, direction, masked)
        entropy[rows] = torch.special.entr(student, out=teacher).sum(-1)
    return TokenScores(kl, teacher_nll, student_nll, entropy, student_greedy, teacher_greedy)


def gathered_log_probs(
    hidden: Float[Tensor, "positions width"],
    head: Head,
    tokens: Int[Tensor, "positions wanted"],
    tile_elements: int | None = None,
) -> Float[Tensor, "positions wanted"]:
    """log p(token | position) of a few wanted tokens at each position, in nats, differentiable, tile by tile.

    Only positions x wanted values are kept; a tile's logits are recomputed in the backward pass.
    """
    values: Tensor = _TiledLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, tokens, tile_elements
    )
    return values


class _TiledLogProbs(torch.autograd.Function):
    """Two phases, as `_TiledKL`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        tokens: Tensor,
        tile_elements: int | None,
    ) -> Tensor:
        ctx.head, ctx.tile_elements = head, tile_elements
        ctx.save_for_backward(hidden, tokens, weight, bias)
        tiles = Tiles(hidden, head, tile_elements, two=False)
        values = hidden.new_empty(tokens.shape, dtype=at_least_float32(hidden))
        for rows in tiles.split(len(hidden)):
            values[rows] = tiles.log_probs(rows).gather(-1, tokens[rows])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, tokens, weight, bias = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        tiles = Tiles(hidden, head, ctx.tile_elements, ctx.needs_input_grad[:3])
        for rows in tiles.split(len(hidden)):
            probs, grad = tiles.log_probs(rows).exp_(), tiles.gradient(rows).zero_()
            position = torch.arange(len(rows), device=rows.device).repeat_interleave(tokens.shape[1])
            add_likelihood_(grad, probs, LikelihoodTerms(position, tokens[rows].flatten(), -grads[0][rows].flatten()))
            tiles.collect(rows)
        return (*tiles.gradients(), None, None, None)
