"""The loss of a training step whose weights are known in advance: one pass over the tiles.

The weights are known when TOPD trains, since selection came before; so each tile's gradient is taken while its logits
are there, and kept. That is (3 width_S + width_T) x vocabulary multiplications per token; two phases take
(4 width_S + 2 width_T).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from topd.algorithm.head import Head, at_least_float32
from topd.algorithm.tiles import (
    Direction,
    LikelihoodTerms,
    Tiles,
    add_likelihood_,
    check_vocabularies,
)


class DistillationLoss(NamedTuple):
    """In nats; only `loss` is differentiable.

    Attributes:
        loss: the weighted sum of token losses and likelihood terms.
        token_loss: [teacher_position] the KL at each position, unweighted, also where its weight is 0.
        nll: [term] -log p_S(token_k | position_k), unweighted.
        outside_top_k: [teacher_position] the student's probability outside the teacher's known tokens; None where the
            teacher's probability of every token is known.
    """

    loss: Float[Tensor, ""]
    token_loss: Float[Tensor, "teacher_positions"]
    nll: Float[Tensor, "term"]
    outside_top_k: Float[Tensor, "teacher_positions"] | None = None


def distillation_loss(
    hidden: Float[Tensor, "positions student_width"],
    head: Head,
    teacher_hidden: Float[Tensor, "teacher_positions teacher_width"],
    teacher_head: Head,
    weights: Float[Tensor, "teacher_positions"],
    terms: LikelihoodTerms | None = None,
    direction: Direction = "reverse",
    tile_elements: int | None = None,
) -> DistillationLoss:
    """`sum_i weights_i KL_i + sum_k weight_k (-log p_S(token_k | position_k))`, without positions x vocabulary.

    The first sum is L_OPD with per-token weights (section 5.1), the second the trajectory loss (section 3, written as
    cross-entropy); taking both in one pass is our choice. The KL is on the first `teacher_positions` rows of `hidden`;
    the others carry likelihood terms only. Differentiable in the student's hidden states and in its head's weight and
    bias; weights and teacher are constant. Gradients are computed in the forward pass and saved; `backward` scales them
    and can run once, even with `retain_graph`. At most `tile_elements` logits of each model (one row at least; chosen
    if None) exist at once. Values are float32 at least. In float16 gradients may underflow, since they are rounded
    before the loss scale is known.

    Args:
        hidden: the student's states.
        head: its output head.
        teacher_hidden: the teacher's states in the contexts of the first rows.
        teacher_head: its head; as many rows as the student's.
        weights: of the token losses, such as 1 / (response tokens of the batch), times a cap.
        terms: of the trajectory loss, from `likelihood_terms`; none if None.
        direction: of the KL: reverse, KL(student || teacher), or forward, KL(teacher || student).
        tile_elements: see above.

    Raises:
        RuntimeError: the heads' vocabularies differ in size; or, in `backward`, it ran before.
        ValueError: the teacher has more rows than the student, or not as many as there are weights.
    """
    check_vocabularies(head, teacher_head)
    if not len(weights) == len(teacher_hidden) <= len(hidden):
        rows = len(weights), len(teacher_hidden), len(hidden)
        raise ValueError(f"weights, teacher and student must have n, n and at least n rows, not {rows}")
    if terms is None:
        none = torch.zeros(0, dtype=torch.long, device=hidden.device)
        terms = LikelihoodTerms(none, none, weights.new_zeros(0))
    inputs = hidden, head.weight, head.bias
    enabled = torch.is_grad_enabled()
    needs_grad = tuple(enabled and each is not None and each.requires_grad for each in inputs)
    values: tuple[Tensor, Tensor, Tensor] = _OnePass.apply(  # type: ignore[no-untyped-call]
        *inputs, head, teacher_hidden, teacher_head, weights, terms, direction, tile_elements, needs_grad
    )
    return DistillationLoss(*values)


class _OnePass(torch.autograd.Function):
    """Values and gradients in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        weights: Tensor,
        terms: LikelihoodTerms,
        direction: Direction,
        tile_elements: int | None,
        needs_grad: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = at_least_float32(hidden)
        weights, terms = weights.to(dtype), terms._replace(weight=terms.weight.to(dtype))
        tiles = Tiles(hidden, head, tile_elements, needs_grad)
        token_loss, nll = weights.new_zeros(len(weights)), weights.new_zeros(len(terms.token))
        for rows, k, has_teacher, has_gradient in _plan(tiles.size, len(hidden), weights, terms, any(needs_grad)):
            here = LikelihoodTerms(torch.searchsorted(rows, terms.position[k]), terms.token[k], terms.weight[k])
            probs, grad = tiles.student[: len(rows)], tiles.gradient(rows)
            tiles.log_probs(rows)
            nll[k] = -probs[here.position, here.token]
            if has_teacher:
                token_loss[rows] = tiles.divergence(rows, teacher_hidden, teacher_head, direction)
                grad.mul_(weights[rows, None])
                grad[weights[rows] == 0] = 0  # an infinite KL of weight 0 too
            else:
                probs.exp_()
                grad.zero_()
            if has_gradient:
                if len(k):
                    add_likelihood_(grad, probs, here)
                tiles.collect(rows)
        ctx.save_for_backward(*tiles.gradients())
        loss = torch.where(weights == 0, 0, weights * token_loss).sum() + (terms.weight * nll).sum()
        ctx.mark_non_differentiable(token_loss, nll)
        return loss, token_loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a second copy of the head's gradient is large; autograd then refuses a second backward.
        scaled = [None if kept is None else kept.mul_(grads[0]) for kept in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None, None, None)


def _plan(
    size: int, positions: int, weights: Tensor, terms: LikelihoodTerms, gradient: bool
) -> Iterator[tuple[Tensor, Tensor, bool, bool]]:
    """Tiles of rows that need the same: (rows ascending, their terms, whether the teacher, whether the gradient).

    Rows of weight 0 without a term get their KL only; rows beyond the teacher's without a term get nothing.
    """
    has_term = weights.new_zeros(positions, dtype=torch.bool).index_fill(0, terms.position, True)
    has_teacher = torch.arange(positions, device=weights.device) < len(weights)
    moves = has_term.clone()
    moves[: len(weights)] |= weights != 0
    order = terms.position.argsort(stable=True)
    for group, teacher, moved in (
        (has_teacher & moves, True, True),
        (has_teacher & ~moves, True, False),
        (~has_teacher & has_term, False, True),
    ):
        tiles = torch.split(group.nonzero().squeeze(-1), size)
        of_group = order[group[terms.position[order]]]
        starts = torch.stack([rows[0] for rows in tiles if len(rows)][1:]) if len(tiles) > 1 else order[:0]
        bounds = torch.searchsorted(terms.position[of_group], starts).tolist()
        for rows, k in zip(tiles, of_group.tensor_split(bounds), strict=True):
            if len(rows):
                yield rows, k, teacher, moved and gradient
