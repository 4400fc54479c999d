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
from torch import Tensor, nn

from topd.algorithm import (
    DistillationLoss,
    LikelihoodTerms,
    TokenScores,
    Transport,
    cap_weights,
    false_alarm_threshold,
    is_fork,
    likelihood_terms,
    negative_entropy,
    position_weights,
    score_known_tokens,
    score_tokens,
)
from topd.algorithm.tiles import Direction
from topd.near_future import DistilledModel, Reading, Rollouts, near_future_transport, rollout_windows
from topd.teachers.top_k import RemoteTeacher, unpack
from topd.training.choices import choose_candidates, choose_capped, choose_guided, choose_low_loss
from topd.training.fork_threshold import LowLossQuartile
from topd.training.futures import Look, NearFuture, WindowPairs, joined
from topd.training.gradient_ratio import gradient_ratio
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
    process: int = 0,
    kept: Reading | None = None,
    at_most: int | None = None,
    quartile: LowLossQuartile | None = None,
    step: int = 0,
) -> NearFuture:
    """Divergence detection: candidates, windows, transport, forks.

    Args:
        rollouts: of this process.
        student: the model that wrote them.
        teacher: in this process or on a server.
        options: the method's choices.
        stage: wraps "scoring", "windows", "calibration" and "transport", to time them.
        gather: joins distances of all processes; what it pads with is NaN.
        process: number of this process.
        kept: what the student kept from sampling these rollouts; without it, it reads them once more.
        at_most: candidates per rollout, for a budget.
        quartile: estimate of the fork threshold, where `fork_rule` is "low_loss_quartile"; updated in place.
        step: optimizer steps so far, for `quartile`.
    """
    calibrates = quartile is not None and quartile.due(step)
    look = joined(
        [
            look_from(
                rollouts[wave], student, teacher, options, stage, None if kept is None else kept[wave], at_most,
                calibrates,
            )
            for wave in waves(rollouts, student, teacher, options, gather)
        ]
    )  # fmt: skip
    candidates = look.candidates
    with stage("transport"):
        transport = transport_of(candidates, rollouts, student, teacher, options)
    low_loss_distance = None
    if quartile is not None and look.low_loss is not None:
        with stage("calibration"):
            low_loss_distance = transport_of(look.low_loss, rollouts, student, teacher, options).distance
            quartile.add(step, gather(low_loss_distance))
    threshold = fork_threshold(transport.distance, options, quartile, gather)
    fork = is_fork(transport.distance, threshold)
    capped = choose_capped(transport.distance, fork, options, gather, process)
    mask = rollouts.loss_mask.bool()
    marked = torch.zeros_like(mask).index_put((candidates.rows, candidates.positions), capped)

    return NearFuture(
        look.token_loss, look.entropy, look.teacher_hidden, **vars(candidates),
        ours_from_rollout=options.student_window == "rollout",
        transport=transport,
        threshold=threshold,
        low_loss_distance=low_loss_distance,
        fork=fork,
        guided=choose_guided(fork, transport, options),
        capped=capped,
        weights=cap_weights(look.token_loss, mask, marked),
    )  # fmt: skip


def transport_of(
    pairs: WindowPairs,
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
) -> Transport:
    """D_OT and plan between the two windows of each place."""
    return near_future_transport(
        pairs.ours, pairs.theirs, rollouts, pairs.rows, pairs.positions, student, teacher,
        embedding=options.embedding, cost=options.ground_cost,
        solver=options.transport_solver, epsilon=options.entropic_epsilon,
    )  # fmt: skip


def fork_threshold(
    distance: Tensor, options: TOPDConfig, quartile: LowLossQuartile | None, gather: Callable[[Tensor], Tensor]
) -> float:
    """D_OT above which a candidate is a fork, by `fork_rule`."""
    if options.fork_rule == "threshold":
        assert options.fork_threshold is not None
        return options.fork_threshold
    if options.fork_rule == "batch_quantile" or quartile is None:
        return false_alarm_threshold(gather(distance), options.false_alarm_share)
    return quartile.value


def look_from(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
    stage: Stage,
    kept: Reading | None,
    at_most: int | None,
    low_loss: bool,
) -> Look:
    """Score rollouts; from their high-loss positions, let both models continue the student's prefix.

    `low_loss`: from some low-loss positions too, for the fork threshold.
    """
    mask = rollouts.loss_mask.bool()
    with stage("scoring"):
        theirs_read = teacher.read(rollouts)
        ours_read = kept or student.read(rollouts, keep_prefix=options.student_window != "rollout")
        scores = score(rollouts, ours_read.hidden, student, theirs_read.hidden, teacher, options)
        candidates = choose_candidates(ranking(scores, options), mask, options, at_most)

    def windows_at(places: Tensor) -> WindowPairs:
        rows, positions = places.nonzero(as_tuple=True)
        length = options.window_length
        theirs = teacher.continue_(rollouts, theirs_read, scores.teacher_greedy, rows, positions, length)
        if options.student_window == "rollout":
            ours = rollout_windows(rollouts, rows, positions, length)
        else:
            ours = student.continue_(
                rollouts, ours_read, scores.student_greedy, rows, positions, length,
                from_candidate=options.student_window == "candidate",
            )  # fmt: skip
        return WindowPairs(rows, positions, ours, theirs)

    with stage("windows"):
        at_candidates = windows_at(candidates)
    at_low_loss = None
    if low_loss:
        with stage("calibration"):
            at_low_loss = windows_at(choose_low_loss(scores.kl, mask, candidates))
    return Look(scores.kl, scores.entropy, theirs_read.hidden, at_candidates, at_low_loss)


def ranking(scores: TokenScores, options: TOPDConfig) -> Tensor:
    """[rollout, position] what makes a position high-loss (nats)."""
    if options.candidate_ranking == "teacher_nll":
        return scores.teacher_nll
    if options.candidate_ranking == "log_ratio":
        return scores.teacher_nll - scores.student_nll
    return scores.kl


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
        gradient_ratio: see `gradient_ratio`; None where it was not measured.
    """

    loss: Tensor
    trajectory: Tensor
    nll: Tensor
    unseen: Tensor | None
    gradient_ratio: Tensor | None = None


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
    num_forks: Tensor,
    measured: list[nn.Parameter] | None = None,
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
        num_forks: what L_traj's sum over forks is divided by: guided forks of that batch.
        measured: parameters over which `gradient_ratio` is estimated; None: it is not.
    """
    mask = rollouts.loss_mask.bool()
    on_rollout = options.student_window == "rollout" and options.guidance_context == "student"
    branches = guided.branches if guided is not None else None
    hidden, window_hidden = student.hidden_and_windows(rollouts, branches, from_rollout=on_rollout)
    theirs, token_weights = teacher_hidden[mask], weights[mask] / num_tokens
    direction = direction_of(options)

    def opd_of(states: Tensor, terms: LikelihoodTerms | None = None) -> DistillationLoss:
        own = states if terms is not None else states[: len(theirs)]
        return loss_on_device(own, student.head(), theirs, teacher.head(), token_weights, terms, direction)

    if guided is None:
        opd = opd_of(hidden[mask])
        return StepLoss(opd.loss, opd.loss.new_zeros(()), opd.loss.new_zeros(()), opd.unseen)

    denominator = num_tokens if options.guidance_reduction == "per_token" else num_forks
    scale = options.guidance_weight * position_weights(guided.targets, options.guidance_reduction) / denominator
    states, row = guided_rows(hidden, window_hidden, mask, guided, on_rollout)

    def guidance_of(states: Tensor) -> Tensor:
        if guided.teacher_hidden is not None:
            return teacher_context_loss(states[len(theirs) :], student, teacher, guided, scale, options)
        terms = likelihood_terms(guided.targets, row, scale)
        nothing = teacher_hidden[:0, 0], teacher.head(), token_weights[:0]
        return loss_on_device(states, student.head(), *nothing, terms).loss

    if guided.teacher_hidden is None:  # both losses in one pass over the vocabulary
        terms = likelihood_terms(guided.targets, row, scale)  # KL(y_i || p_S) = cross-entropy to y_i - entropy of y_i
        both = opd_of(states, terms)
        constant = (scale * negative_entropy(guided.targets)).sum()
        loss, unseen = both.loss + constant, both.unseen
        guidance = ((terms.weight * both.nll).sum() + constant).detach()
    else:
        opd, traj = opd_of(states), guidance_of(states)
        loss, unseen, guidance = opd.loss + traj, opd.unseen, traj.detach()
    ratio = None
    if measured and bool(guided.targets.guided.any()):
        ratio = gradient_ratio(states, measured, guidance_of, lambda states: opd_of(states).loss)
    return StepLoss(loss, guidance / options.guidance_weight, loss.new_zeros(()), unseen, ratio)


def teacher_context_loss(
    states: Tensor, student: DistilledModel, teacher: DistilledModel | RemoteTeacher, guided: Guided, scale: Tensor,
    options: TOPDConfig,
) -> Tensor:  # fmt: skip
    """Weighted full-vocabulary KL at the guided positions in the teacher's contexts (another reading of L_traj)."""
    assert guided.teacher_hidden is not None
    positions = guided.targets.guided
    theirs = guided.teacher_hidden.flatten(0, 1)[positions]
    direction: Direction = "reverse" if options.teacher_context_loss == "reverse_kl" else "forward"
    return loss_on_device(states, student.head(), theirs, teacher.head(), scale[positions], direction=direction).loss


def waves(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel | RemoteTeacher,
    options: TOPDConfig,
    gather: Callable[[Tensor], Tensor],
) -> list[slice]:
    """As many rollouts at a time as both models' keys and values have room for; the same number in all processes."""
    per_token = teacher.cache_bytes_per_token + (
        student.cache_bytes_per_token if options.student_window != "rollout" else 0
    )
    length = float(rollouts.input_ids.shape[1])
    longest = gather(torch.tensor([length], device=rollouts.input_ids.device)).max().item()
    size = max(1, int(options.window_memory * 2**30 // (per_token * longest))) if per_token else 1
    return [slice(start, start + size) for start in range(0, len(rollouts), size)]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the marked positions back in place; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
