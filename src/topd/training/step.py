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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topd.algorithm import (
    Targets,
    Transport,
    cap_weights,
    false_alarm_threshold,
    gathered_log_probs,
    highest_loss,
    is_fork,
    make_targets,
    own_token_share,
    score_tokens,
    select_for_capping,
    token_kl_from_hidden,
    trajectory_loss,
)
from topd.algorithm.token_loss import Direction
from topd.near_future import Branches, DistilledModel, Rollouts, Windows, near_future_transport, rollout_windows

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

Stage = Callable[[str], AbstractContextManager[None]]
"""Wraps a named part of the step, to time it."""


@dataclass(frozen=True)
class NearFuture:
    """What looking ahead found in a batch of rollouts. Candidates are numbered rollout by rollout, left to right.

    Attributes:
        token_loss: [rollout, position] nats.
        entropy: [rollout, position] of the student, nats.
        rows, positions: [candidate] where each candidate is.
        ours, theirs: windows of student and teacher at each candidate.
        ours_from_rollout: whether `ours` is the rollout's own path, so that nothing was generated for it.
        transport: between them.
        fork: [candidate] True at forks, False at false alarms.
        guided: [candidate] True where the trajectory loss applies.
        capped: [candidate] True where the token loss is capped.
        weights: [rollout, position] of the token losses; 1 unless capped.
        teacher_hidden: [rollout, position, width], kept so that the teacher runs once.
    """

    token_loss: Tensor
    entropy: Tensor
    rows: Tensor
    positions: Tensor
    ours: Windows
    theirs: Windows
    ours_from_rollout: bool
    transport: Transport
    fork: Tensor
    guided: Tensor
    capped: Tensor
    weights: Tensor
    teacher_hidden: Tensor


@torch.no_grad()
def look_ahead(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel,
    options: TOPDConfig,
    stage: Stage,
    gather: Callable[[Tensor], Tensor] = lambda distance: distance,
) -> NearFuture:
    """Divergence detection: candidates, windows, transport, forks. `gather` joins distances of all processes."""
    mask = rollouts.loss_mask.bool()
    with stage("scoring"):
        token_loss, teacher_nll, entropy, teacher_hidden = score(rollouts, student, teacher, options)
        ranking = token_loss if options.candidate_ranking == "reverse_kl" else teacher_nll
        rows, positions = choose_candidates(ranking, mask, options).nonzero(as_tuple=True)

    with stage("windows"):
        prefixes = [
            rollouts.prefix(row, position) for row, position in zip(rows.tolist(), positions.tolist(), strict=True)
        ]
        theirs = teacher.continue_(prefixes, options.window_length)
        if options.student_window == "rollout":
            ours = rollout_windows(rollouts, rows, positions, options.window_length)
        else:
            ours = student.continue_(prefixes, options.window_length)

    with stage("transport"):
        transport = near_future_transport(
            ours, theirs, prefixes, student, teacher,
            embedding=options.embedding, cost=options.ground_cost,
            solver=options.transport_solver, epsilon=options.entropic_epsilon,
        )  # fmt: skip
        threshold = options.fork_threshold
        if threshold is None:
            threshold = false_alarm_threshold(gather(transport.distance), options.false_alarm_share)
        fork = is_fork(transport.distance, threshold=threshold)
        capped = choose_capped(transport.distance, threshold, options)
        marked = torch.zeros_like(mask).index_put((rows, positions), capped)

    return NearFuture(
        token_loss=token_loss,
        entropy=entropy,
        rows=rows,
        positions=positions,
        ours=ours,
        theirs=theirs,
        ours_from_rollout=options.student_window == "rollout",
        transport=transport,
        fork=fork,
        guided=choose_guided(fork, transport, options),
        capped=capped,
        weights=cap_weights(token_loss, mask, marked),
        teacher_hidden=teacher_hidden,
    )


@torch.no_grad()
def score(
    rollouts: Rollouts, student: DistilledModel, teacher: DistilledModel, options: TOPDConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token loss, teacher's NLL, student's entropy: [rollout, position] nats, 0 at padding; the teacher's states."""
    mask = rollouts.loss_mask.bool()
    teacher_hidden = teacher.hidden(rollouts)
    scores = score_tokens(
        student.hidden(rollouts)[mask],
        student.head(),
        teacher_hidden[mask],
        teacher.head(),
        rollouts.response_ids[mask],
        "reverse" if options.beta == 1 else "forward",
    )
    token_loss, teacher_nll, entropy = (scatter(values, mask) for values in scores[:3])
    return token_loss, teacher_nll, entropy, teacher_hidden


def choose_candidates(ranking: Tensor, mask: Tensor, options: TOPDConfig) -> Tensor:
    """High-loss positions; the control "random" takes equally many positions of each rollout at random instead."""
    if options.guides and options.guidance_at == "random":
        ranking = torch.rand(ranking.shape, device=ranking.device)
    return highest_loss(
        ranking,
        mask,
        share=options.candidate_share,
        count=options.candidate_count,
        threshold=options.candidate_threshold,
        spacing=options.candidate_spacing,
    )


def choose_capped(distance: Tensor, threshold: float, options: TOPDConfig) -> Tensor:
    """Whose token loss is capped: see section 5.1."""
    if options.method == "opd-capped":
        return select_for_capping(distance, options.cap_selection, threshold=threshold)
    if options.cap_false_alarms:
        return select_for_capping(distance, "low", threshold=threshold)
    return torch.zeros_like(distance, dtype=torch.bool)


def choose_guided(fork: Tensor, transport: Transport, options: TOPDConfig) -> Tensor:
    """Where the trajectory loss applies: at forks; the control "false_alarms" takes the others."""
    if not options.guides:
        return torch.zeros_like(fork)
    if options.guidance_at == "false_alarms":
        return transport.converged & ~fork
    return fork


@dataclass(frozen=True)
class Guided:
    """The windows that the student is trained on, laid out by rollout so that they travel with the batch.

    Attributes:
        branches: the windows whose contexts the student is put in: its own, or the teacher's.
        weight: [rollout, branch, window_position, target_position]; rows sum to 1, or to 0 where not guided.
        tokens: [rollout, branch, target_position] that the columns of `weight` stand for.
        teacher_hidden: [rollout, branch, window_position, width] the teacher's states, where a KL needs them.
    """

    branches: Branches
    weight: Tensor
    tokens: Tensor
    teacher_hidden: Tensor | None = None

    @property
    def targets(self) -> Targets:
        """The same, with [rollout, branch] as one axis."""
        return Targets(self.weight.flatten(0, 1), self.tokens.flatten(0, 1))


def topd_loss(
    rollouts: Rollouts,
    student: DistilledModel,
    teacher: DistilledModel,
    teacher_hidden: Tensor,
    weights: Tensor,
    guided: Guided | None,
    options: TOPDConfig,
    num_tokens: Tensor,
    num_guided: Tensor,
) -> tuple[Tensor, Tensor]:
    """L_OPD + lambda L_traj, with gradients, and the detached L_traj. Both in nats.

    Args:
        teacher_hidden: [rollout, position, width] from `look_ahead`.
        weights: [rollout, position] of the token losses.
        guided: windows to train on, or None.
        num_tokens, num_guided: what the two sums are divided by: response tokens, and guided positions (or forks), of
            the whole batch over which the optimizer steps.
    """
    mask = rollouts.loss_mask.bool()
    own_path = options.student_window == "rollout" and options.guidance_context == "student"
    branches = guided.branches if guided is not None else None
    hidden, window_hidden = student.hidden_and_windows(rollouts, branches, from_rollout=own_path)
    direction: Direction = "reverse" if options.beta == 1 else "forward"
    token_loss = token_kl_from_hidden(hidden[mask], student.head(), teacher_hidden[mask], teacher.head(), direction)
    opd = (weights[mask] * token_loss).sum() / num_tokens
    if guided is None:
        return opd, opd.new_zeros(())
    traj = window_loss(window_hidden, student, teacher, guided, options).sum() / num_guided
    return opd + options.guidance_weight * traj, traj.detach()


def window_loss(
    hidden: Tensor, student: DistilledModel, teacher: DistilledModel, guided: Guided, options: TOPDConfig
) -> Tensor:
    """[rollout * branch, window_position] the loss at each window position, nats; 0 where nothing is guided."""
    targets = guided.targets
    positions = targets.guided
    loss = torch.zeros(positions.shape, dtype=torch.float32, device=hidden.device)
    states = hidden.flatten(0, 1)[positions]  # only these meet the vocabulary
    if options.guidance_context == "teacher" and options.teacher_context_loss != "cross_entropy":
        assert guided.teacher_hidden is not None
        theirs = guided.teacher_hidden.flatten(0, 1)[positions]
        direction: Direction = "reverse" if options.teacher_context_loss == "reverse_kl" else "forward"
        return loss.masked_scatter(
            positions, token_kl_from_hidden(states, student.head(), theirs, teacher.head(), direction)
        )
    wanted = targets.tokens[:, None, :].expand(*positions.shape, -1)
    log_probs = torch.zeros_like(targets.weight).masked_scatter(
        positions[..., None], gathered_log_probs(states, student.head(), wanted[positions])
    )
    return trajectory_loss(log_probs, targets)


def guided_windows(future: NearFuture, rollouts: Rollouts, options: TOPDConfig) -> Guided:
    """Lay the guided candidates out as [rollout, branch, ...]; at least one slot, empty if need be."""
    at_most = torch.bincount(future.rows[future.guided], minlength=len(rollouts)).max().clamp(min=1)
    slots = int(at_most)
    chosen = future.guided.nonzero().squeeze(-1)
    rows = future.rows[chosen]
    slot = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)  # rows are sorted

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(len(rollouts), slots, *values.shape[1:])
        out[rows, slot] = values
        return out

    ours, theirs = future.ours[chosen], future.theirs[chosen]
    windows = theirs if options.guidance_context == "teacher" else ours
    if options.guidance_context == "teacher":  # the teacher's window is both context and target
        targets = make_targets(
            "own", future.transport.plan[chosen], theirs.tokens, theirs.mask, theirs.tokens, theirs.mask
        )
    else:
        targets = make_targets(
            options.guidance_target, future.transport.plan[chosen], ours.tokens, ours.mask, theirs.tokens, theirs.mask
        )
    return Guided(
        Branches(spread(future.positions[chosen]), spread(windows.tokens), spread(windows.mask)),
        weight=spread(targets.weight),
        tokens=spread(targets.tokens),
    )


def own_share(guided: Guided) -> Tensor:
    """[guided position] how much of each target is the student's own token."""
    targets = guided.targets
    return own_token_share(targets, guided.branches.tokens.flatten(0, 1))[targets.guided]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the marked positions back in place; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
