"""Near-future guidance: the loss at forks, over the whole window (section 3).

For the i-th position of the student's window the paper defines the target y_i = sum_j gamma_ij onehot(teacher token j)
and the loss KL(y_i || p_S(. | c_{t+i})), where c_{t+i} is the student's own context. It needs K x K log-probabilities
per fork; no target over the vocabulary is built.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topd.algorithm.vocabulary import LikelihoodTerms, check_choice

TargetKind = Literal["transport", "same_index", "own"]
"""transport: the paper. Controls: same_index, the teacher's token at the same index (no alignment); own, the student's
own token (pure sharpening)."""
Reduction = Literal["mean", "sum", "per_token"]
"""See `position_weights`."""


class Targets(NamedTuple):
    """The target distribution of each student window position.

    Attributes:
        weight: [fork, student_position, target_position]; each guided row sums to 1, other rows are 0.
        tokens: [fork, target_position] the token of each column.
    """

    weight: Float[Tensor, "fork student_position target_position"]
    tokens: Int[Tensor, "fork target_position"]

    @property
    def guided(self) -> Bool[Tensor, "fork student_position"]:
        """[fork, student_position] whether the position has a target."""
        return self.weight.sum(-1) > 0


def make_targets(
    kind: TargetKind,
    plan: Float[Tensor, "fork student_position teacher_position"],
    student_tokens: Int[Tensor, "fork student_position"],
    student_mask: Bool[Tensor, "fork student_position"],
    teacher_tokens: Int[Tensor, "fork teacher_position"],
    teacher_mask: Bool[Tensor, "fork teacher_position"],
) -> Targets:
    """Targets at forks, from the windows and their masks, which are True at real tokens.

    With an exact plan a transport target is one token (one-hot); with an entropic plan it is soft. A position that is
    matched mostly to padding after the teacher's EOS has no target (our choice). `kind`: transport is the paper
    (section 3), the others are controls; `same_index` guides as many positions as the shorter window has.
    """
    check_choice("kind", kind, TargetKind)
    student_mask, teacher_mask = student_mask.bool(), teacher_mask.bool()
    real = student_mask[:, :, None] & teacher_mask[:, None, :]
    if kind == "transport":
        share = torch.where(real, rescale_rows(plan), 0.0)  # the rest of a row is matched to padding after EOS
        return Targets(rescale_rows(share * (share.sum(-1, keepdim=True) >= 0.5)), teacher_tokens)
    tokens, present = (student_tokens, student_mask) if kind == "own" else (teacher_tokens, teacher_mask)
    same = torch.eye(student_mask.shape[1], present.shape[1], dtype=plan.dtype, device=plan.device)
    return Targets(same * student_mask[:, :, None] * present[:, None, :], tokens)


def rescale_rows(
    plan: Float[Tensor, "fork student_position teacher_position"],
) -> Float[Tensor, "fork student_position teacher_position"]:
    """Scale rows to sum to 1, so that a target is a distribution (a plan's rows sum to 1/K). Empty rows stay 0.

    The paper's y_i = sum_j gamma_ij onehot(teacher token j) sums to 1/K. So its sum over the window has the gradient of
    the mean of the KLs to these rescaled targets (see `position_weights`).
    """
    mass = plan.sum(-1, keepdim=True)
    return torch.where(mass > 0, plan / mass.clamp(min=torch.finfo(plan.dtype).tiny), 0.0)


def trajectory_loss(
    log_probs: Float[Tensor, "fork student_position target_position"], targets: Targets
) -> Float[Tensor, "fork student_position"]:
    """KL(y_i || p_S(. | c_{t+i})) at each window position, in nats; 0 at positions without a target.

    This is the definition. Training computes the same sum from `likelihood_terms` and `negative_entropy`, in the same
    pass over the vocabulary as the token loss.

    Args:
        log_probs: log p_S(target token j | the student's context at window position i).
        targets: from `make_targets`. Columns with the same token are one outcome of y_i.
    """
    weight = targets.weight.to(log_probs.dtype)
    return negative_entropy(targets).to(log_probs.dtype) + torch.where(weight > 0, -weight * log_probs, 0.0).sum(-1)


def negative_entropy(targets: Targets) -> Float[Tensor, "fork student_position"]:
    """sum_v y_i(v) log y_i(v), in nats: the constant part of the trajectory loss."""
    weight = targets.weight
    same_token = (targets.tokens[:, :, None] == targets.tokens[:, None, :]).to(weight.dtype)
    probability = weight @ same_token  # y_i(token of column j), summed over its copies
    return (weight * probability.clamp(min=torch.finfo(weight.dtype).tiny).log()).sum(-1)


def position_weights(targets: Targets, reduction: Reduction) -> Float[Tensor, "fork student_position"]:
    """The weight of each position's KL in L_traj, which is a sum over forks; 0 at positions without a target.

    mean: 1 / (guided positions of the fork), so every fork has weight 1. The paper's sum over the window, with target
    rows that sum to 1/K, has the same gradient as this mean. sum and per_token: 1 each (K times the paper's).
    """
    check_choice("reduction", reduction, Reduction)
    guided = targets.guided.to(targets.weight.dtype)
    return guided / guided.sum(-1, keepdim=True).clamp(min=1) if reduction == "mean" else guided


def likelihood_terms(
    targets: Targets,
    row: Int[Tensor, "fork student_position"],
    scale: Float[Tensor, "fork student_position"] | None = None,
) -> LikelihoodTerms:
    """The cross-entropy part of the trajectory loss, -sum_j y_ij log p_S(token j), as (row, token, weight) terms.

    `row`: of the hidden states that predicts each window position; overlapping windows may share rows. `scale`: factor
    on each position's loss; None: 1.
    """
    fork, position, column = targets.weight.nonzero(as_tuple=True)
    weight = targets.weight[fork, position, column]
    if scale is not None:
        weight = weight * scale[fork, position]
    return LikelihoodTerms(row[fork, position], targets.tokens[fork, column], weight)


def own_token_share(
    targets: Targets, student_tokens: Int[Tensor, "fork student_position"]
) -> Float[Tensor, "fork student_position"]:
    """The target probability of the student's own token at each position.

    Its mean over guided positions is the share of guidance that only sharpens: the student imitates itself.
    """
    own = student_tokens[:, :, None] == targets.tokens[:, None, :]
    return (targets.weight * own).sum(-1)
