"""The step: on-policy distillation, and what TOPD adds to it.

OPD samples a response from the student and pulls the student, token by token, towards the teacher (reverse KL). TOPD

1. looks, at the tokens with the highest loss, at how student and teacher would go on from the same prefix,
2. measures by optimal transport how far these two near futures are apart,
3. calls the low distances false alarms and the high ones forks, and
4. at forks adds a loss over the whole window, aligned by the transport plan.

`look_ahead` is section 3, "Divergence Detection"; `topd_loss` is "Trajectory-level Teacher Signal Injection". Both are
written in the paper's order and words. Timing, logging and audit stand around them, in the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from topd.algorithm import (
    Head,
    LikelihoodTerms,
    TokenScores,
    cap_weights,
    false_alarm_threshold,
    is_fork,
    likelihood_terms,
    negative_entropy,
    score_known_tokens,
    score_tokens,
)
from topd.algorithm.tiles import Direction
from topd.near_future import (
    DistilledModel,
    Reading,
    RemoteTeacher,
    Rollouts,
    near_future_transport,
    rollout_windows,
)
from topd.near_future.remote_teacher import unpack
from topd.training.choices import choose_candidates, choose_capped, choose_guided
from topd.training.futures import NearFuture, Seen, joined
from topd.training.guided import Guided, guided_rows
from topd.training.kernels import loss_on_device

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

Stage = Callable[[str], AbstractContextManager[None]]
"""Wraps a named part of the step, to time it."""


@torch.no_grad()
def look_ahead(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
    stage: Stage,
    gather: Callable[[Tensor], Tensor] = lambda distance: distance,
    kept: Reading | None = None,
    at_most: int | None = None,
) -> NearFuture:
    """Divergence detection: candidates, windows, transport, forks.

    Args:
        rollouts: of this process.
        student: the model that wrote them.
        teacher: in this process or on a server.
        options: the method's choices.
        stage: wraps "scoring", "windows" and "transport", to time them.
        gather: joins distances of all processes.
        kept: what the student kept from sampling these rollouts; without it, it reads them once more.
        at_most: candidates a rollout, for a budget.
    """
    seen = joined(
        [
            look_from(rollouts[wave], student, teacher, options, stage, None if kept is None else kept[wave], at_most)
            for wave in waves(rollouts, student, teacher, options, gather)
        ]
    )
    with stage("transport"):
        transport = near_future_transport(
            seen.ours, seen.theirs, rollouts, seen.rows, seen.positions, student, teacher,
            embedding=options.embedding, cost=options.ground_cost,
            solver=options.transport_solver, epsilon=options.entropic_epsilon,
        )  # fmt: skip
        threshold = options.fork_threshold
        if threshold is None:
            threshold = false_alarm_threshold(gather(transport.distance), options.false_alarm_share)
        fork = is_fork(transport.distance, threshold=threshold)
        capped = choose_capped(transport.distance, threshold, options)
        mask = rollouts.loss_mask.bool()
        marked = torch.zeros_like(mask).index_put((seen.rows, seen.positions), capped)

    return NearFuture(
        **vars(seen),
        ours_from_rollout=options.student_window == "rollout",
        transport=transport,
        fork=fork,
        guided=choose_guided(fork, transport, options),
        capped=capped,
        weights=cap_weights(seen.token_loss, mask, marked),
    )


def look_from(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
    stage: Stage,
    kept: Reading | None,
    at_most: int | None,
) -> Seen:
    """Score rollouts; from their high-loss positions, let both models go on from the student's prefix."""
    mask = rollouts.loss_mask.bool()
    with stage("scoring"):
        theirs_read = teacher.read(rollouts)
        ours_read = kept or student.read(rollouts, keep_prefix=options.student_window == "regenerated")
        scores = score(rollouts, ours_read.hidden, student, theirs_read.hidden, teacher, options)
        ranking = scores.kl if options.candidate_ranking == "reverse_kl" else scores.teacher_nll
        rows, positions = choose_candidates(ranking, mask, options, at_most).nonzero(as_tuple=True)

    with stage("windows"):
        length = options.window_length
        theirs = teacher.continue_(rollouts, theirs_read, scores.teacher_greedy, rows, positions, length)
        if options.student_window == "rollout":
            ours = rollout_windows(rollouts, rows, positions, length)
        else:
            ours = student.continue_(rollouts, ours_read, scores.student_greedy, rows, positions, length)
    return Seen(scores.kl, scores.entropy, theirs_read.hidden, rows, positions, ours, theirs)


@torch.no_grad()
def score(
    rollouts: Rollouts,
    student_hidden: Tensor,
    student: DistilledModel,
    teacher_hidden: Tensor,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
) -> TokenScores:
    """Scores of the response tokens from both models' states, [rollout, position] each; 0 at padding."""
    mask, direction = rollouts.loss_mask.bool(), direction_of(options)
    ours, theirs, sampled = student_hidden[mask], teacher_hidden[mask], rollouts.response_ids[mask]
    teacher_head = teacher.head()
    if teacher_head is None:
        scores = score_known_tokens(ours, student.head(), unpack(theirs), sampled, direction)
    else:
        scores = score_tokens(ours, student.head(), theirs, teacher_head, sampled, direction)
    return TokenScores(*(scatter(values, mask) for values in scores))


class StepLoss(NamedTuple):
    """What the optimizer steps on, and what is logged of it (detached). Nats.

    Attributes:
        loss: L_OPD + lambda L_traj, with gradients.
        trajectory: L_traj.
        nll: sum over response tokens of -log p_S(sampled token), whose mean estimates the entropy; of `opd_loss` only.
        unseen: [token] see `DistillationLoss`.
    """

    loss: Tensor
    trajectory: Tensor
    nll: Tensor
    unseen: Tensor | None


def direction_of(options: TOPDConfig) -> Direction:
    """Of the token loss: reverse, KL(student || teacher), for beta 1 (the paper); forward for beta 0."""
    return "reverse" if options.beta == 1 else "forward"


def opd_loss(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    teacher_hidden: Tensor,
    options: TOPDConfig,
    num_tokens: Tensor,
) -> StepLoss:
    """L_OPD alone: the sum of token losses over `num_tokens`, the response tokens of the whole batch."""
    mask = rollouts.loss_mask.bool()
    hidden, _ = student.hidden_and_windows(rollouts, None)
    sampled = rollouts.response_ids[mask]
    ones = torch.ones(sampled.shape, device=sampled.device)
    silent = LikelihoodTerms(torch.arange(len(sampled), device=sampled.device), sampled, 0 * ones)
    result = loss_on_device(
        hidden[mask], student.head(), teacher_hidden[mask], teacher.head(), ones / num_tokens, silent,
        direction_of(options),
    )  # fmt: skip
    return StepLoss(result.loss, result.loss.new_zeros(()), result.nll.sum(), result.unseen)


def topd_loss(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    teacher_hidden: Tensor,
    weights: Tensor,
    guided: Guided | None,
    options: TOPDConfig,
    num_tokens: Tensor,
    num_guided: Tensor,
) -> StepLoss:
    """L_OPD + lambda L_traj.

    Args:
        rollouts: of this micro-batch.
        student: with gradients.
        teacher: whose head is used.
        teacher_hidden: [rollout, position, width] from `look_ahead`.
        weights: [rollout, position] of the token losses.
        guided: windows to train on, or None.
        options: lambda and what else the method chooses.
        num_tokens: what L_OPD's sum is divided by: response tokens of the batch over which the optimizer steps.
        num_guided: the same for L_traj: guided positions (or forks).
    """
    mask = rollouts.loss_mask.bool()
    on_rollout = options.student_window == "rollout" and options.guidance_context == "student"
    branches = guided.branches if guided is not None else None
    hidden, window_hidden = student.hidden_and_windows(rollouts, branches, from_rollout=on_rollout)
    heads, theirs, token_weights = (student.head(), teacher.head()), teacher_hidden[mask], weights[mask] / num_tokens
    direction, zero = direction_of(options), token_weights.new_zeros(())

    if guided is None or guided.teacher_hidden is not None:
        opd = loss_on_device(hidden[mask], heads[0], theirs, heads[1], token_weights, direction=direction)
        if guided is None:
            return StepLoss(opd.loss, zero, zero, opd.unseen)
        traj = teacher_context_loss(window_hidden, heads, guided, options) / num_guided
        return StepLoss(opd.loss + options.guidance_weight * traj, traj.detach(), zero, opd.unseen)

    targets, scale = guided.targets, options.guidance_weight / num_guided
    states, row = guided_rows(hidden, window_hidden, mask, guided, on_rollout)
    terms = likelihood_terms(targets, row)  # L_traj = sum KL(y_i || p_S) = cross-entropy to y_i - entropy of y_i
    scaled = terms._replace(weight=terms.weight * scale)
    both = loss_on_device(states, heads[0], theirs, heads[1], token_weights, scaled, direction)
    minus_entropy = negative_entropy(targets).sum()
    traj = ((terms.weight * both.nll).sum() + minus_entropy) / num_guided
    return StepLoss(both.loss + scale * minus_entropy, traj, zero, both.unseen)


def teacher_context_loss(
    window_hidden: Tensor, heads: tuple[Head, Head | None], guided: Guided, options: TOPDConfig
) -> Tensor:
    """Sum over guided positions of the full-vocabulary KL in the teacher's contexts (another reading of L_traj)."""
    assert guided.teacher_hidden is not None
    positions = guided.targets.guided
    ours, theirs = window_hidden.flatten(0, 1)[positions], guided.teacher_hidden.flatten(0, 1)[positions]
    direction: Direction = "reverse" if options.teacher_context_loss == "reverse_kl" else "forward"
    ones = torch.ones(len(ours), device=ours.device)
    return loss_on_device(ours, heads[0], theirs, heads[1], ones, direction=direction).loss


def waves(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
    gather: Callable[[Tensor], Tensor],
) -> list[slice]:
    """As many rollouts at a time as both models' keys and values have room for; the same number in all processes."""
    per_token = teacher.cache_bytes_per_token + (
        student.cache_bytes_per_token if options.student_window == "regenerated" else 0
    )
    length = float(rollouts.input_ids.shape[1])
    longest = gather(torch.tensor([length], device=rollouts.input_ids.device)).max().item()
    size = max(1, int(options.window_memory * 2**30 // (per_token * longest))) if per_token else 1
    return [slice(start, start + size) for start in range(0, len(rollouts), size)]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the marked positions back in place; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
