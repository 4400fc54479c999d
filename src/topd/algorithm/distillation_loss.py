"""The loss of a training step, L_OPD + lambda L_traj, in one pass over the tiles.

Candidates and forks are selected before the loss, so all weights are known. Each tile's gradient is therefore computed
while its logits exist. This takes (3 width_S + width_T) x vocabulary multiplications per token; to recompute the logits
in the backward pass would take (4 width_S + 2 width_T).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.algorithm.token_loss import KnownTokens, gathered_log_probs, known_token_kl
from topd.algorithm.vocabulary import (
    Direction,
    Head,
    LikelihoodTerms,
    Tiles,
    add_likelihood_,
    at_least_float32,
    check_choice,
    check_vocabularies,
    converted,
    in_dtypes,
)


class DistillationLoss(NamedTuple):
    """The loss and its parts, in nats. Only `loss` is differentiable.

    Attributes:
        loss: the weighted sum of token losses and likelihood terms.
        token_loss: [teacher_position] the KL at each position, unweighted, also where the weight is 0.
        nll: [term] -log p_S(token_k | position_k), unweighted.
        outside_top_k: [teacher_position] student probability outside the teacher's top-k tokens; None if the teacher's
            full distribution is known.
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

    The first sum is L_OPD with per-token weights (section 5.1): KL_i is `token_kl` at row i. The second sum is the
    trajectory loss (section 3): `trajectory_loss` minus `negative_entropy`. To compute both in one pass is our choice.

    The KL covers the first `teacher_positions` rows of `hidden`; the other rows have likelihood terms only. The loss is
    differentiable in the student's hidden states and in its head's weight and bias; weights and teacher are constant.
    The forward pass computes and saves the gradients; `backward` scales them, and can run only once, even with
    `retain_graph`. Values are at least float32. In float16, gradients neither underflow nor overflow before the loss
    scale is applied: those of single positions are for a largest weight of about 1, and sums are float32.

    Args:
        hidden: the student's last hidden states.
        head: the student's head.
        teacher_hidden: the teacher's last hidden states in the contexts of the first rows.
        teacher_head: the teacher's head, with the same vocabulary.
        weights: of the token losses, such as 1 / (response tokens of the batch), times a cap.
        terms: of the trajectory loss, from `likelihood_terms`; None: no terms.
        direction: of the KL: reverse, KL(student || teacher), or forward, KL(teacher || student).
        tile_elements: maximum number of logits per model in memory at once (at least one row); None: automatic.

    Raises:
        RuntimeError: the heads' vocabularies differ in size; or `backward` runs a second time.
        ValueError: the teacher has more rows than the student, or the number of weights differs from the teacher's
            rows.
    """
    check_choice("direction", direction, Direction)
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
    """Computes values and gradients in the forward pass."""

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
        ctx.unit = unit = power_of_two_above(weights, terms.weight)
        tiles = Tiles(hidden, head, tile_elements, needs_grad)
        teacher_head = converted(teacher_head, teacher_hidden)
        ctx.dtypes = tiles.dtypes
        token_loss, nll = weights.new_zeros(len(weights)), weights.new_zeros(len(terms.token))
        for rows, k, has_teacher, has_gradient in _plan(tiles.size, len(hidden), weights, terms, any(needs_grad)):
            here = LikelihoodTerms(torch.searchsorted(rows, terms.position[k]), terms.token[k], terms.weight[k] / unit)
            probs, grad = tiles.student[: len(rows)], tiles.gradient(rows)
            tiles.log_probs(rows)
            nll[k] = -probs[here.position, here.token]
            if has_teacher:
                token_loss[rows] = tiles.divergence(rows, teacher_hidden, teacher_head, direction)
                grad.mul_(weights[rows, None] / unit)
                grad[weights[rows] == 0] = 0  # an infinite KL of weight 0 too
            elif has_gradient:
                probs.exp_()
                grad.zero_()
            if has_gradient:
                if len(k):
                    add_likelihood_(grad, probs, here)
                tiles.collect(rows)
        ctx.save_for_backward(*tiles.grads)
        loss = torch.where(weights == 0, 0, weights * token_loss).sum() + (terms.weight * nll).sum()
        ctx.mark_non_differentiable(token_loss, nll)
        return loss, token_loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a second copy of the head's gradient is large. Autograd then raises on a second backward.
        scaled = (None if kept is None else kept.mul_(grads[0] * ctx.unit) for kept in ctx.saved_tensors)
        return (*in_dtypes(scaled, ctx.dtypes), None, None, None, None, None, None, None, None)


def power_of_two_above(*weights: Tensor) -> Tensor:
    """The next power of two above the largest absolute weight; 1 if all are 0. Dividing by it is exact."""
    largest = torch.cat([each.detach().abs() for each in (*weights, weights[0].new_zeros(1))]).max()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _plan(
    size: int, positions: int, weights: Tensor, terms: LikelihoodTerms, gradient: bool
) -> Iterator[tuple[Tensor, Tensor, bool, bool]]:
    """Split the rows into tiles by what they need: (rows ascending, their terms, needs teacher, needs gradient).

    Rows with weight 0 and no term need the KL only. Rows beyond the teacher's without a term are skipped.
    """
    kind = weights.new_zeros(positions, dtype=torch.int8)
    # 1: KL and gradient; 2: KL only; 3: likelihood terms and gradient; 4: likelihood terms of weight 0 only
    kind[: len(weights)] = torch.where(weights != 0, 1, 2)
    kind[terms.position[terms.position >= len(weights)]] = 4
    live = terms.position[terms.weight != 0]
    kind[live] = torch.where(live < len(weights), 1, 3).to(torch.int8)
    order = terms.position.argsort(stable=True)
    for group, needs_teacher, needs_gradient in (
        (1, True, True), (2, True, False), (3, False, True), (4, False, False),
    ):  # fmt: skip
        tiles = torch.split((kind == group).nonzero().squeeze(-1), size)
        of_group = order[kind[terms.position[order]] == group]
        starts = torch.stack([rows[0] for rows in tiles if len(rows)][1:]) if len(tiles) > 1 else order[:0]
        bounds = torch.searchsorted(terms.position[of_group], starts).tolist()
        for rows, k in zip(tiles, of_group.tensor_split(bounds), strict=True):
            if len(rows):
                yield rows, k, needs_teacher, needs_gradient and gradient


def known_token_loss(
    hidden: Float[Tensor, "positions width"],
    head: Head,
    teacher: KnownTokens,
    weights: Float[Tensor, "teacher_positions"],
    terms: LikelihoodTerms | None = None,
    direction: Direction = "reverse",
) -> DistillationLoss:
    """`distillation_loss` against the teacher's top-k tokens; `direction` as in `known_token_kl`.

    The KL covers the first rows of `hidden`, one per weight; the others have likelihood terms only. Weights and teacher
    are constant.
    """
    log_probs = gathered_log_probs(hidden[: len(weights)], head, teacher.tokens)
    token_loss, outside_top_k = known_token_kl(log_probs, teacher, direction)
    loss, nll = (weights * token_loss).sum(), token_loss.new_zeros(0)
    if terms is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool((terms.weight != 0).any())):
            nll = -gathered_log_probs(hidden[terms.position], head, terms.token[:, None]).squeeze(-1)
        loss = loss + (terms.weight * nll).sum()
    return DistillationLoss(loss, token_loss.detach(), nll.detach(), outside_top_k)


def prefix_weights(
    now: Float[Tensor, "rollout position"],
    then: Float[Tensor, "rollout position"],
    mask: Bool[Tensor, "rollout position"],
    most: float,
) -> Float[Tensor, "rollout position"]:
    """min(exp(mean over i < t of log p_now(i) - log p_then(i)), most) at each position t; no gradient.

    With a full-vocabulary KL the loss at a stored prefix is exact for the current student; only the prefix itself is
    stale. This is the geometric mean of its tokens' likelihood ratios (REVO, 2609.37500). It is 1 at a rollout's first
    token, whose prefix is the prompt, and everywhere while the student has not changed.

    Args:
        now: log-probabilities (nats) of the sampled tokens under the current student.
        then: the same under the student that sampled them.
        mask: the response tokens, the only ones that count.
        most: upper bound of the weights; 4 in that paper.
    """
    mask = mask.bool()
    drift = torch.where(mask, now - then, 0.0)
    before = mask.cumsum(-1) - mask.long()
    return ((drift.cumsum(-1) - drift) / before.clamp(min=1)).exp().clamp(max=most)
