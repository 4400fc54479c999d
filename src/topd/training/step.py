"""The step: on-policy distillation, and what TOPD adds to it.

OPD samples a response from the student and pulls the student, token by token, towards the teacher (reverse KL). TOPD

1. looks, at the tokens with the highest loss, at how student and teacher would continue the same prefix,
2. measures by optimal transport how far apart these two near futures are,
3. calls the low distances false alarms and the high ones forks, and
4. at forks adds a loss over the whole window, aligned by the transport plan.

`look_ahead` is section 3, "Divergence Detection"; `topd_loss` is "Trajectory-level Teacher Signal Injection". Both are
written in the paper's order and words. What they ask of student and teacher is in `near_future.protocol`. Timing,
logging and audit are the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from topd.algorithm import LikelihoodTerms, TokenScores, Transport, cap_weights, is_fork
from topd.algorithm.transport import entropic_transport, exact_transport
from topd.near_future.protocol import EitherModel, Student, Teacher
from topd.near_future.windows import Places, Prefill, Rollouts, Windows, comparable, rollout_windows
from topd.training.losses import GuidanceLoss, LossInputs, OPDLoss, StepLoss, scatter, states_and_rows
from topd.training.method import (
    Futures,
    Look,
    Method,
    NearFuture,
    Stage,
    StepContext,
    StudentWindow,
    choose_candidates,
    choose_capped,
    choose_guided,
    choose_low_loss,
    fork_threshold,
)

ALONE = StepContext()
"""A single step in one process."""

# ------------------------------------------------------------------------------------------------ divergence detection


@torch.no_grad()
def look_ahead(
    rollouts: Rollouts, student: Student, teacher: Teacher, method: Method, context: StepContext = ALONE
) -> NearFuture:
    """Divergence detection: candidates, windows, transport, forks."""
    parts = waves(rollouts, student, teacher, method, context)
    look = Look.cat([look_at(rollouts[part], student, teacher, method, context.of(part)) for part in parts])
    threshold = fork_threshold(look, method, context)
    fork = is_fork(look.candidates.distance, threshold)
    guided = choose_guided(fork, look.candidates, method)
    capped = choose_capped(fork, look.candidates, method, context)
    weights = cap_weights(look.token_loss, rollouts.loss_mask.bool(), look.candidates.places.marks(capped))
    return NearFuture(look, threshold, fork, guided, capped, weights)


def look_at(rollouts: Rollouts, student: Student, teacher: Teacher, method: Method, context: StepContext) -> Look:
    """Score rollouts; from their high-loss positions, let both models continue the student's prefix."""
    with context.stage("scoring"):
        scores, pair = score(rollouts, student, teacher, method, context.sampled)
        high_loss = choose_candidates(scores, rollouts, method, context.max_candidates)
    candidates = look_from(high_loss, pair, method, context.stage)
    low_loss = None
    if context.calibrates:  # the fork threshold of section 2.1
        low_loss = look_from(choose_low_loss(scores.kl, high_loss), pair, method, context.calibration)
    return Look(scores.kl, scores.entropy, scores.student_nll, pair.theirs.states, candidates, low_loss)


def look_from(places: Places, pair: Pair, method: Method, stage: Stage = ALONE.stage) -> Futures:
    """From each place both models continue the student's prefix by K tokens; D_OT and plan between the two windows.

    Training, the probe and local correction all look ahead through this function.
    """
    with stage("windows"):
        theirs = pair.teacher.continue_(places.as_teacher_reads, method.window_length, pair.theirs)
        ours = student_windows(places, pair, method.student_window, method.window_length)
    with stage("transport"):
        return Futures(places, ours, theirs, near_future_transport(places, ours, theirs, pair, method))


@dataclass(frozen=True)
class Pair:
    """Both models, and what each computed when it read the rollouts.

    Attributes:
        student, teacher: the models.
        ours, theirs: their prefills of the same rollouts; without, windows start from fresh prefixes.
    """

    student: Student
    teacher: Teacher
    ours: Prefill = Prefill({})
    theirs: Prefill = Prefill({})


def score(
    rollouts: Rollouts, student: Student, teacher: Teacher, method: Method, sampled: Prefill | None = None
) -> tuple[TokenScores, Pair]:
    """Both models read the rollouts. Scores of the response tokens, [rollout, position] each; 0 at padding.

    `method` gives the direction of the token loss, and whether the student keeps its prefix for windows. `sampled`:
    what the student computed while it sampled the rollouts; None: it reads them once more.
    """
    mask = rollouts.loss_mask.bool()
    theirs = teacher.prefill(rollouts.as_teacher_reads)
    ours = sampled or student.prefill(rollouts, keep_prefix=method.student_window != "rollout")
    known = {name: values[mask] for name, values in theirs.states.items()}
    flat = teacher.scores(ours.hidden[mask], student.head(), known, rollouts.response_ids[mask], method.direction)
    scores = TokenScores(*(scatter(values, mask) for values in flat))
    ours, theirs = replace(ours, greedy=scores.student_greedy), replace(theirs, greedy=scores.teacher_greedy)
    return scores, Pair(student, teacher, ours, theirs)


def student_windows(places: Places, pair: Pair, kind: StudentWindow, length: int) -> Windows:
    """The student's windows at the places, in one of the three readings of the paper's text."""
    if kind == "rollout":
        return rollout_windows(places, length)
    return pair.student.continue_(places, length, pair.ours, from_candidate=kind == "candidate")


def near_future_transport(places: Places, ours: Windows, theirs: Windows, pair: Pair, method: Method) -> Transport:
    """Transport between the student's windows (rows) and the teacher's (columns) at the same places.

    Windows that EOS ended are compared as if EOS were repeated up to K, see `comparable`. The embedding (the student's
    static ones by default), the cost and the solver are our choice, see `TOPDConfig`.
    """
    model: EitherModel = pair.student
    if method.embedding.startswith("teacher"):
        model, places = pair.teacher, places.as_teacher_reads
    a, b = comparable(ours, theirs, pair.student.eos_token_ids)
    if method.embedding.endswith("_hidden"):
        costs = model.window_costs(ours, theirs, places, hidden=True, cost=method.ground_cost)
        alike = (a.tokens == b.tokens).cumprod(1).bool()  # in the same context: equal states, but for rounding
        costs.diagonal(dim1=1, dim2=2).masked_fill_(alike, 0.0)
    else:
        costs = model.window_costs(a, b, places, cost=method.ground_cost)
    if method.transport_solver == "entropic":
        return entropic_transport(costs, a.mask, b.mask, epsilon=method.entropic_epsilon)
    return exact_transport(costs, a.mask, b.mask)


def waves(rollouts: Rollouts, student: Student, teacher: Teacher, method: Method, context: StepContext) -> list[slice]:
    """As many rollouts at a time as both models' keys and values have room for; the same number in all processes."""
    kept = student.cache_bytes_per_token if method.student_window != "rollout" else 0
    per_token = teacher.cache_bytes_per_token + kept
    length = torch.tensor([float(rollouts.width)], device=rollouts.input_ids.device)
    longest = context.gather(length).max().item()
    size = max(1, int(context.window_memory * 2**30 // (per_token * longest))) if per_token else len(rollouts)
    return [slice(start, start + size) for start in range(0, len(rollouts), size)]


# ------------------------------------------------------------------------- trajectory-level teacher signal injection


def opd_loss(rollouts: Rollouts, student: Student, teacher: Teacher, inputs: LossInputs, method: Method) -> StepLoss:
    """L_OPD alone: the sum of token losses over `num_tokens`."""
    states, _ = states_and_rows(rollouts, student, None, method)
    opd = OPDLoss.of(states, rollouts, student, teacher, inputs, method)
    sampled = rollouts.response_ids[opd.mask]
    silent = LikelihoodTerms(torch.arange(len(sampled), device=sampled.device), sampled, 0 * opd.weights)  # for `nll`
    alone = opd(states, silent)
    return StepLoss(alone.loss, nll=alone.nll.sum(), outside_top_k=alone.outside_top_k)


def topd_loss(rollouts: Rollouts, student: Student, teacher: Teacher, inputs: LossInputs, method: Method) -> StepLoss:
    """L_OPD + lambda L_traj, in one pass over the vocabulary where both stand in the student's contexts."""
    states, row = states_and_rows(rollouts, student, inputs.guided, method)
    opd = OPDLoss.of(states, rollouts, student, teacher, inputs, method)
    if inputs.guided is None:
        alone = opd(states)
        return StepLoss(alone.loss, outside_top_k=alone.outside_top_k)
    guidance = GuidanceLoss.of(opd, inputs, row, method)  # lambda L_traj
    loss, trajectory, outside_top_k = guidance.with_opd(states)
    ratio = guidance.gradient_ratio(states, inputs.measured)
    return StepLoss(loss, trajectory / method.guidance_weight, None, outside_top_k, ratio)
