"""The step: on-policy distillation, and what TOPD adds to it.

OPD samples a response from the student and pulls the student, token by token, towards the teacher (reverse KL). TOPD

1. looks, at the tokens with the highest loss, at how student and teacher would continue the same prefix,
2. measures by optimal transport how far apart these two near futures are,
3. calls the low distances false alarms and the high ones forks, and
4. at forks adds a loss over the whole window, aligned by the transport plan.

`look_ahead` is section 3, "Divergence Detection"; `topd_loss` is "Trajectory-level Teacher Signal Injection". Both are
written in the paper's order and words. Timing, logging and audit are the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from topd.algorithm import (
    DistillationLoss,
    Head,
    LikelihoodTerms,
    TokenScores,
    cap_weights,
    is_fork,
    likelihood_terms,
    negative_entropy,
    position_weights,
)
from topd.algorithm.tiles import Direction
from topd.near_future import (
    DistilledModel,
    Places,
    Prefill,
    Rollouts,
    Windows,
    near_future_transport,
    rollout_windows,
)
from topd.teachers.protocol import Teacher
from topd.training.choices import choose_candidates, choose_capped, choose_guided, choose_low_loss, fork_threshold
from topd.training.futures import Futures, Look, NearFuture
from topd.training.guidance import Guided, gradient_ratio, guided_rows
from topd.training.method import Method, Stage, StepContext, StudentWindow

ALONE = StepContext()
"""A single step in one process."""

# ------------------------------------------------------------------------------------------------ divergence detection


@torch.no_grad()
def look_ahead(
    rollouts: Rollouts, student: DistilledModel, teacher: Teacher, method: Method, context: StepContext = ALONE
) -> NearFuture:
    """Divergence detection: candidates, windows, transport, forks."""
    look = Look.cat(
        [
            look_at(rollouts[wave], student, teacher, method, context.of(wave))
            for wave in waves(rollouts, student, teacher, method, context)
        ]
    )
    candidates = look.candidates
    threshold = fork_threshold(candidates, look.low_loss, method, context)
    fork = is_fork(candidates.distance, threshold)
    guided = choose_guided(fork, candidates, method)
    capped = choose_capped(candidates.distance, fork, method, context)
    weights = cap_weights(look.token_loss, rollouts.loss_mask.bool(), candidates.places.marks(capped))
    return NearFuture(look, threshold, fork, guided, capped, weights)


def look_at(
    rollouts: Rollouts, student: DistilledModel, teacher: Teacher, method: Method, context: StepContext
) -> Look:
    """Score rollouts; from their high-loss positions, let both models continue the student's prefix."""
    mask = rollouts.loss_mask.bool()
    with context.stage("scoring"):
        scores, pair = score(rollouts, student, teacher, method, context.sampled)
        high_loss = choose_candidates(ranking(scores, method), mask, method, context.max_candidates)
    candidates = look_from(Places.marked(rollouts, high_loss), pair, method, context.stage)
    low_loss = None
    if context.quartile is not None and context.quartile.due(context.step):
        with context.stage("calibration"):
            places = Places.marked(rollouts, choose_low_loss(scores.kl, mask, high_loss))
            low_loss = look_from(places, pair, method)
    assert pair.theirs is not None
    return Look(scores.kl, scores.entropy, pair.theirs.states, candidates, low_loss)


def look_from(places: Places, pair: Pair, method: Method, stage: Stage = ALONE.stage) -> Futures:
    """From each place both models continue the student's prefix by K tokens; D_OT and plan between the two windows.

    Training, the probe and local correction all look ahead through this function.
    """
    with stage("windows"):
        theirs = pair.teacher.continue_(places, method.window_length, pair.theirs)
        ours = student_windows(places, pair, method.student_window, method.window_length)
    with stage("transport"):
        return futures(places, ours, theirs, pair, method)


@dataclass(frozen=True)
class Pair:
    """Both models, and what each computed when it read the rollouts.

    Attributes:
        student, teacher: the models.
        ours, theirs: their prefills of the same rollouts; None: windows start from fresh prefixes.
    """

    student: DistilledModel
    teacher: Teacher
    ours: Prefill | None = None
    theirs: Prefill | None = None


def score(
    rollouts: Rollouts, student: DistilledModel, teacher: Teacher, method: Method, sampled: Prefill | None = None
) -> tuple[TokenScores, Pair]:
    """Both models read the rollouts. Scores of the response tokens, [rollout, position] each; 0 at padding.

    Args:
        rollouts: to score.
        student: that wrote them.
        teacher: in this process or on a server.
        method: direction of the token loss; whether the student keeps its prefix for windows.
        sampled: what the student computed while it sampled them; None: it reads them once more.
    """
    mask = rollouts.loss_mask.bool()
    theirs = teacher.prefill(rollouts)
    ours = sampled or student.prefill(rollouts, keep_prefix=method.student_window != "rollout")
    known = {name: values[mask] for name, values in theirs.states.items()}
    flat = teacher.scores(ours.hidden[mask], student.head(), known, rollouts.response_ids[mask], method.direction)
    scores = TokenScores(*(scatter(values, mask) for values in flat))
    ours, theirs = replace(ours, greedy=scores.student_greedy), replace(theirs, greedy=scores.teacher_greedy)
    return scores, Pair(student, teacher, ours, theirs)


def ranking(scores: TokenScores, method: Method) -> Tensor:
    """[rollout, position] what makes a position high-loss (nats)."""
    if method.candidate_ranking == "teacher_nll":
        return scores.teacher_nll
    if method.candidate_ranking == "log_ratio":
        return scores.teacher_nll - scores.student_nll
    return scores.kl


def student_windows(places: Places, pair: Pair, kind: StudentWindow, length: int) -> Windows:
    """The student's windows at the places, in one of the three readings of the paper's text."""
    if kind == "rollout":
        return rollout_windows(places, length)
    return pair.student.continue_(places, length, pair.ours, from_candidate=kind == "candidate")


def futures(places: Places, ours: Windows, theirs: Windows, pair: Pair, method: Method) -> Futures:
    """Both windows at each place, with the transport between them."""
    transport = near_future_transport(
        ours, theirs, places, pair.student, pair.teacher, embedding=method.embedding, cost=method.ground_cost,
        solver=method.transport_solver, epsilon=method.entropic_epsilon,
    )  # fmt: skip
    return Futures(places, ours, theirs, transport)


def waves(
    rollouts: Rollouts, student: DistilledModel, teacher: Teacher, method: Method, context: StepContext
) -> list[slice]:
    """As many rollouts at a time as both models' keys and values have room for; the same number in all processes."""
    kept = student.cache_bytes_per_token if method.student_window != "rollout" else 0
    per_token = teacher.cache_bytes_per_token + kept
    length = torch.tensor([float(rollouts.input_ids.shape[1])], device=rollouts.input_ids.device)
    longest = context.gather(length).max().item()
    size = max(1, int(context.window_memory * 2**30 // (per_token * longest))) if per_token else 1
    return [slice(start, start + size) for start in range(0, len(rollouts), size)]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the marked positions back in place; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


# ------------------------------------------------------------------------- trajectory-level teacher signal injection


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a micro-batch needs in addition to its rollouts and models.

    Attributes:
        teacher_states: the teacher's `Prefill.states` of the rollouts.
        num_tokens: divides L_OPD's sum: response tokens of the batch over which the optimizer steps.
        weights: [rollout, position] of the token losses; None: 1.
        guided: windows to train on, or None.
        num_forks: divides L_traj's sum over forks: guided forks of that batch.
        measured: parameters over which `gradient_ratio` is estimated; None: it is not.
    """

    teacher_states: dict[str, Tensor]
    num_tokens: Tensor
    weights: Tensor | None = None
    guided: Guided | None = None
    num_forks: Tensor | None = None
    measured: list[nn.Parameter] | None = None


class StepLoss(NamedTuple):
    """What the optimizer steps on, and what is logged of it (detached). Nats.

    Attributes:
        loss: L_OPD + lambda L_traj, with gradients.
        trajectory: L_traj.
        nll: sum over response tokens of -log p_S(sampled token), whose mean estimates the entropy; of `opd_loss` only.
        outside_top_k: [token] see `DistillationLoss`.
        gradient_ratio: see `gradient_ratio`; None where it was not measured.
    """

    loss: Tensor
    trajectory: Tensor
    nll: Tensor
    outside_top_k: Tensor | None
    gradient_ratio: Tensor | None = None


def opd_loss(
    rollouts: Rollouts, student: DistilledModel, teacher: Teacher, inputs: LossInputs, direction: Direction
) -> StepLoss:
    """L_OPD alone: the sum of token losses over `num_tokens`."""
    mask = rollouts.loss_mask.bool()
    hidden, _ = student.hidden_and_windows(rollouts, None)
    sampled, known = rollouts.response_ids[mask], {name: each[mask] for name, each in inputs.teacher_states.items()}
    ones = torch.ones(sampled.shape, device=sampled.device)
    silent = LikelihoodTerms(torch.arange(len(sampled), device=sampled.device), sampled, 0 * ones)  # for `nll`
    opd = teacher.loss(hidden[mask], student.head(), known, ones / inputs.num_tokens, silent, direction)
    return StepLoss(opd.loss, opd.loss.new_zeros(()), opd.nll.sum(), opd.outside_top_k)


def topd_loss(
    rollouts: Rollouts, student: DistilledModel, teacher: Teacher, inputs: LossInputs, method: Method
) -> StepLoss:
    """L_OPD + lambda L_traj, in one pass over the vocabulary where both stand in the student's contexts.

    L_traj is `trajectory_loss`, sum_i KL(y_i || p_S(. | c_i)), as its two parts: the cross-entropy to the targets y_i,
    as likelihood terms of the same pass as L_OPD, and minus the entropy of y_i, which has no gradient.
    """
    mask, guided, head = rollouts.loss_mask.bool(), inputs.guided, student.head()
    known = {name: values[mask] for name, values in inputs.teacher_states.items()}
    weights = (mask.float() if inputs.weights is None else inputs.weights)[mask] / inputs.num_tokens
    on_rollout = method.student_window == "rollout" and method.guidance_context == "student"
    branches = None if guided is None or on_rollout else guided.branches
    hidden, window_hidden = student.hidden_and_windows(rollouts, branches)

    def opd(states: Tensor, terms: LikelihoodTerms | None = None) -> DistillationLoss:
        return teacher.loss(states, head, known, weights, terms, method.direction)

    if guided is None:
        alone = opd(hidden[mask])
        return StepLoss(alone.loss, alone.loss.new_zeros(()), alone.loss.new_zeros(()), alone.outside_top_k)

    states, row = guided_rows(hidden, window_hidden, mask, guided, on_rollout)
    scale = guidance_scale(guided, inputs, method)
    terms = likelihood_terms(guided.targets, row, scale)

    def guidance(states: Tensor) -> Tensor:
        if guided.teacher_hidden is not None:
            return teacher_context_loss(states[len(weights) :], head, teacher, guided, scale, method)
        nothing = {name: values[:0] for name, values in known.items()}
        return teacher.loss(states, head, nothing, weights[:0], terms).loss

    if guided.teacher_hidden is None:
        both = opd(states, terms)
        minus_entropy = (scale * negative_entropy(guided.targets)).sum()
        loss, trajectory = both.loss + minus_entropy, (terms.weight * both.nll).sum() + minus_entropy
    else:
        both, trajectory = opd(states[: len(weights)]), guidance(states)
        loss = both.loss + trajectory
    ratio = None
    if inputs.measured and bool(guided.targets.guided.any()):
        ratio = gradient_ratio(states, inputs.measured, guidance, lambda states: opd(states[: len(weights)]).loss)
    return StepLoss(loss, trajectory.detach() / method.guidance_weight, loss.new_zeros(()), both.outside_top_k, ratio)


def guidance_scale(guided: Guided, inputs: LossInputs, method: Method) -> Tensor:
    """[rollout * branch, window_position] what each position's KL is multiplied by in lambda L_traj."""
    assert inputs.num_forks is not None
    denominator = inputs.num_tokens if method.guidance_reduction == "per_token" else inputs.num_forks
    return method.guidance_weight * position_weights(guided.targets, method.guidance_reduction) / denominator


def teacher_context_loss(
    states: Tensor, head: Head, teacher: Teacher, guided: Guided, scale: Tensor, method: Method
) -> Tensor:
    """Weighted full-vocabulary KL at the guided positions in the teacher's contexts (another reading of L_traj)."""
    assert guided.teacher_hidden is not None
    positions = guided.targets.guided
    theirs = {"hidden": guided.teacher_hidden.flatten(0, 1)[positions]}
    direction: Direction = "reverse" if method.teacher_context_loss == "reverse_kl" else "forward"
    return teacher.loss(states, head, theirs, scale[positions], direction=direction).loss
