"""The guided windows; L_OPD and lambda L_traj of a micro-batch; and the ratio of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from topd.algorithm import (
    DistillationLoss,
    Head,
    LikelihoodTerms,
    Targets,
    gathered_log_probs,
    likelihood_terms,
    make_targets,
    negative_entropy,
    own_token_share,
    position_weights,
    prefix_weights,
)
from topd.algorithm.vocabulary import Direction
from topd.near_future.protocol import Student, Teacher
from topd.near_future.windows import Branches, Rollouts, slots
from topd.training.method import Futures, Method

RATIO_EVERY = 10
"""Optimizer steps from one estimate of the gradient ratio to the next."""
RATIO_PARAMETERS = 8
"""Trainable parameters, the last ones of the backbone, over which the norms are taken."""


# ------------------------------------------------------------------------------------------------------- guided windows


@dataclass(frozen=True)
class Guided:
    """The windows that the student is trained on, laid out by rollout so that they travel with the batch."""

    branches: Branches  # the windows whose contexts the student is put in: its own, or the teacher's
    weight: Tensor  # [rollout, branch, window_position, target_position]; rows sum to 1, or to 0 where not guided
    tokens: Tensor  # [rollout, branch, target_position] that the columns of `weight` stand for
    # [rollout, branch, window_position, width] the teacher's states, where a KL needs them
    teacher_hidden: Tensor | None = None
    context: Literal["student", "teacher"] = "student"  # whose window the branches are

    @property
    def targets(self) -> Targets:
        """The same, with [rollout, branch] as one axis."""
        return Targets(self.weight.flatten(0, 1), self.tokens.flatten(0, 1))


def guided_windows(chosen: Futures, method: Method) -> Guided:
    """Lay the guided futures out as [rollout, branch, ...]; at least one slot, empty if need be."""
    places, ours, theirs, plan = chosen.places, chosen.ours, chosen.theirs, chosen.transport.plan
    rows, count = places.rows, len(places.rollouts)
    most = int(torch.bincount(rows, minlength=count).max().clamp(min=1))
    slot = slots(rows)

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(count, most, *values.shape[1:])
        out[rows, slot] = values
        return out

    kind = method.guidance_target
    if method.guidance_context == "teacher":  # the teacher's window is both context and target
        ours, kind = theirs, "same_index"
    targets = make_targets(kind, plan, ours.tokens, ours.mask, theirs.tokens, theirs.mask)
    return Guided(
        Branches(spread(places.positions), spread(ours.tokens), spread(ours.mask)),
        weight=spread(targets.weight),
        tokens=spread(targets.tokens),
        context=method.guidance_context,
    )


def own_share(guided: Guided) -> Tensor:
    """[guided position] how much of each target is the student's own token; in the student's contexts."""
    targets = guided.targets
    return own_token_share(targets, guided.branches.tokens.flatten(0, 1))[targets.guided]


# --------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a micro-batch needs in addition to its rollouts and models."""

    teacher_states: dict[str, Tensor]  # the teacher's `Prefill.states` of the rollouts
    num_tokens: Tensor  # divides L_OPD's sum: response tokens of the batch over which the optimizer steps
    weights: Tensor | None = None  # [rollout, position] of the token losses; None: 1
    guided: Guided | None = None  # windows to train on, or None
    num_forks: Tensor | None = None  # divides L_traj's sum over forks: guided forks of that batch
    measured: list[nn.Parameter] | None = None  # parameters over which `gradient_ratio` is estimated; None: it is not
    # [rollout, position] of the sampled tokens under the student that sampled them, for `prefix_weights`; None: no such
    # weights
    old_log_probs: Tensor | None = None


class StepLoss(NamedTuple):
    """What the optimizer steps on, and what is logged of it (detached). Nats."""

    loss: Tensor  # L_OPD + lambda L_traj, with gradients
    trajectory: Tensor | None = None  # L_traj; None without guidance
    # sum over response tokens of -log p_S(sampled token), whose mean estimates the entropy; of `opd_loss` only
    nll: Tensor | None = None
    outside_top_k: Tensor | None = None  # [token] see `DistillationLoss`
    gradient_ratio: Tensor | None = None  # see `gradient_ratio`; None where it was not measured


@dataclass(frozen=True)
class OPDLoss:
    """L_OPD of a micro-batch, as a function of the student's states. Nats."""

    head: Head  # the student's
    teacher: Teacher  # that the student is compared with
    known: dict[str, Tensor]  # the teacher's states at the response tokens
    mask: Tensor  # [rollout, position] the response tokens
    weights: Tensor  # [token] of their losses
    direction: Direction  # of the KL

    @classmethod
    def of(
        cls, states: Tensor, rollouts: Rollouts, student: Student, teacher: Teacher, inputs: LossInputs,
        method: Method,
    ) -> OPDLoss:  # fmt: skip
        """After the student's forward pass, in which FSDP2 holds its head whole; `states` as in `states_and_rows`."""
        mask, head = rollouts.loss_mask.bool(), student.head()
        known = {name: values[mask] for name, values in inputs.teacher_states.items()}
        weights = mask.float() if inputs.weights is None else inputs.weights
        if inputs.old_log_probs is not None and method.prefix_weight_max is not None:
            now = sampled_log_probs(states, head, rollouts)
            weights = weights * prefix_weights(now, inputs.old_log_probs, mask, float(method.prefix_weight_max))
        return cls(head, teacher, known, mask, weights[mask] / inputs.num_tokens, method.direction)

    def __call__(self, states: Tensor, terms: LikelihoodTerms | None = None) -> DistillationLoss:
        """Of [row, width], whose first rows predict the response tokens; with likelihood terms in the same pass."""
        states = states[: len(self.weights)] if terms is None else states
        return self.teacher.loss(states, self.head, self.known, self.weights, terms, self.direction)


@dataclass(frozen=True)
class GuidanceLoss:
    """lambda L_traj of a micro-batch, as a function of the same states. Nats."""

    opd: OPDLoss  # whose models it shares
    guided: Guided  # the windows
    scale: Tensor  # [rollout * branch, window_position] what each position's KL is multiplied by
    terms: LikelihoodTerms  # the cross-entropies to the targets

    @classmethod
    def of(cls, opd: OPDLoss, inputs: LossInputs, row: Tensor, method: Method) -> GuidanceLoss:
        """`row`: where each guided position stands among the states, see `states_and_rows`."""
        assert inputs.guided is not None
        assert inputs.num_forks is not None
        targets = inputs.guided.targets
        denominator = inputs.num_tokens if method.guidance_reduction == "per_token" else inputs.num_forks
        scale = method.guidance_weight * position_weights(targets, method.guidance_reduction) / denominator
        return cls(opd, inputs.guided, scale, likelihood_terms(targets, row, scale))

    @property
    def minus_entropy(self) -> Tensor:
        """What the cross-entropies lack to be KLs; it has no gradient."""
        return (self.scale * negative_entropy(self.guided.targets)).sum()

    def with_opd(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """L_OPD + lambda L_traj, lambda L_traj (detached), and L_OPD's `outside_top_k`.

        L_traj is `trajectory_loss`, sum_i KL(y_i || p_S(. | c_i)), as its two parts: the cross-entropy to the targets
        y_i, as likelihood terms of the same pass over the vocabulary as L_OPD, and minus the entropy of y_i.
        """
        if self.guided.teacher_hidden is not None:  # another reading: KLs in the teacher's contexts
            opd, guidance = self.opd(states), self(states)
            return opd.loss + guidance, guidance.detach(), opd.outside_top_k
        both = self.opd(states, self.terms)
        guidance = (self.terms.weight * both.nll).sum() + self.minus_entropy
        return both.loss + self.minus_entropy, guidance.detach(), both.outside_top_k

    def gradient_ratio(self, states: Tensor, parameters: list[nn.Parameter] | None) -> Tensor | None:
        """See the function `gradient_ratio`; None without parameters, or where no position has a target."""
        if not parameters or len(self.terms.weight) == 0:
            return None
        return gradient_ratio(states, parameters, self, lambda states: self.opd(states).loss)

    def __call__(self, states: Tensor) -> Tensor:
        """Of [row, width]; without its constant in the student's contexts."""
        teacher, head, count = self.opd.teacher, self.opd.head, len(self.opd.weights)
        if self.guided.teacher_hidden is None:
            nothing = {name: values[:0] for name, values in self.opd.known.items()}
            return teacher.loss(states, head, nothing, self.opd.weights[:0], self.terms).loss
        positions = self.guided.targets.guided
        theirs = {"hidden": self.guided.teacher_hidden.flatten(0, 1)[positions]}
        return teacher.loss(states[count:], head, theirs, self.scale[positions]).loss


def states_and_rows(
    rollouts: Rollouts, student: Student, guided: Guided | None, method: Method
) -> tuple[Tensor, Tensor]:
    """The student's states that meet the vocabulary, with gradients, and where each guided position stands among them.

    Returns:
        [row, width]: the response tokens', then those of window positions that are not the rollout's own path; and
        [rollout * branch, window_position] row numbers (of guided positions only).
    """
    mask = rollouts.loss_mask.bool()
    on_rollout = method.student_window == "rollout" and method.guidance_context == "student"
    branches = None if guided is None or on_rollout else guided.branches
    hidden, window_hidden = student.hidden_and_windows(rollouts, branches)
    states = hidden[mask]
    if guided is None:
        return states, mask.new_zeros(0, dtype=torch.long)
    positions = guided.targets.guided
    if on_rollout:
        row = (mask.flatten().cumsum(0) - 1).view(mask.shape)
        place = guided.branches.position[..., None] + torch.arange(positions.shape[1], device=mask.device)
        rollout = torch.arange(len(mask), device=mask.device)[:, None, None]
        return states, row[rollout, place.clamp(max=mask.shape[1] - 1)].flatten(0, 1)
    rows = len(states) + positions.flatten().cumsum(0).view(positions.shape) - 1
    return torch.cat([states, window_hidden.flatten(0, 1)[positions]]), rows


@torch.no_grad()
def sampled_log_probs(states: Tensor, head: Head, rollouts: Rollouts) -> Tensor:
    """[rollout, position] log p (nats) of the sampled tokens, 0 at padding; `states` [row, width] begin with theirs."""
    mask = rollouts.loss_mask.bool()
    tokens = rollouts.response_ids[mask][:, None]
    return scatter(gathered_log_probs(states[: len(tokens)], head, tokens).squeeze(-1), mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the marked positions back in place; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def last_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """The parameters for `gradient_ratio`; none where they are sharded (FSDP2)."""
    trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad][-RATIO_PARAMETERS:]
    return [] if any(isinstance(parameter, DTensor) for parameter in trainable) else trainable


def gradient_ratio(
    states: Tensor,
    parameters: list[nn.Parameter],
    guidance: Callable[[Tensor], Tensor],
    opd: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """|grad guidance| / |grad opd| over the parameters; our choice. It needs two more passes over the vocabulary.

    None where the loss reaches none of them: the last parameters of some models belong to images or sound. `guidance`
    and `opd` are lambda L_traj and L_OPD as functions of the `states` [row, width], whose graph is kept. The backward
    pass stops at the first of the parameters.
    """
    norms = []
    for loss in (guidance, opd):
        leaf = states.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        found = torch.autograd.grad(states, parameters, gradient, retain_graph=True, allow_unused=True)
        reached = [each.norm() for each in found if each is not None]
        if not reached:
            return None
        norms.append(torch.stack(reached).norm())
    return norms[0] / norms[1]
