"""What the method is, apart from how it is trained: its choices, what looking ahead finds, which positions it takes.

The step, the probe and local correction share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

import numpy
import torch
from torch import Tensor

from topd.algorithm import (
    TokenScores,
    Transport,
    false_alarm_threshold,
    highest_loss,
    low_loss_threshold,
    select_for_capping,
)
from topd.algorithm.forks import PAPER_CANDIDATE_SHARE, PAPER_FALSE_ALARM_SHARE, ForkRule, Selection
from topd.algorithm.guidance import TargetKind
from topd.algorithm.transport import GroundCost
from topd.algorithm.vocabulary import Direction
from topd.near_future.windows import Places, Prefill, Rollouts, Windows

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

Ranking = Literal["reverse_kl", "teacher_nll", "log_ratio"]
"""What makes a position high-loss: the token loss; the teacher's NLL of the sampled token; log p_S - log p_T of it."""
StudentWindow = Literal["rollout", "candidate", "regenerated"]
"""rollout: the rollout's own next K tokens. candidate: the candidate token, then the student's greedy continuation.
regenerated: the student's greedy continuation of the prefix, whose first token need not be the candidate."""
Embedding = Literal["student", "teacher", "student_hidden", "teacher_hidden"]
"""Static input embeddings of a model, or its last hidden states over the windows."""
Solver = Literal["exact", "entropic"]
"""`exact_transport` or `entropic_transport`."""
Stage = Callable[[str], AbstractContextManager[None]]
"""Wraps a named part of the step, to time it."""


@dataclass(frozen=True)
class Method:
    """The choices of the method. Fields that `TOPDConfig` has too mean the same; docs/options.md explains them."""

    direction: Direction = "reverse"  # of the token loss: reverse, KL(student || teacher) (the paper), or forward
    guides: bool = True  # whether the trajectory loss is part of the loss
    # whose token loss is capped: "false_alarms"; "low", "high" or "random" by rank (section 5.1); None: no one
    caps: Literal["false_alarms"] | Selection | None = None
    window_length: int = 50
    student_window: StudentWindow = "rollout"
    candidate_ranking: Ranking = "reverse_kl"
    candidate_share: float = PAPER_CANDIDATE_SHARE
    embedding: Embedding = "student"
    ground_cost: GroundCost = "cosine"
    transport_solver: Solver = "exact"
    entropic_epsilon: float = 0.05
    fork_rule: ForkRule = "low_loss_quartile"
    false_alarm_share: float = PAPER_FALSE_ALARM_SHARE
    fork_threshold: float | None = None
    guidance_weight: float = 0.03
    guidance_reduction: Literal["mean", "sum", "per_token"] = "mean"
    guidance_target: TargetKind = "transport"
    guidance_at: Literal["forks", "false_alarms", "random"] = "forks"
    guidance_context: Literal["student", "teacher"] = "student"
    prefix_weight_max: float | None = None

    @classmethod
    def of(cls, config: TOPDConfig) -> Method:
        """The method that a training run has."""
        same = {field.name: getattr(config, field.name) for field in fields(cls) if hasattr(config, field.name)}
        capped: Literal["false_alarms"] | None = "false_alarms" if config.cap_false_alarms else None
        caps = config.cap_selection if config.method == "opd-capped" else capped if config.method == "topd" else None
        return cls(**same | {"direction": "reverse" if config.beta == 1 else "forward", "caps": caps})


@dataclass(frozen=True)
class StepContext:
    """What a step takes from the run around it. The defaults are those of a single step in one process."""

    stage: Stage = lambda name: nullcontext()  # times "scoring", "windows", "calibration" and "transport"
    # joins values [place] of all processes; what it pads with is NaN
    gather: Callable[[Tensor], Tensor] = lambda values: values
    process: int = 0  # number of this process
    # what the student computed while it sampled the rollouts; None: it reads them once more
    sampled: Prefill | None = None
    max_candidates: int | None = None  # per rollout, for a budget; None: no limit
    # the running estimate of the fork threshold, with `fork_rule="low_loss_quartile"`
    quartile: LowLossQuartile | None = None
    step: int = 0  # batches of rollouts so far, one per optimizer step by default
    window_memory: float = 4.0  # GiB for the keys and values of the rollouts whose windows are decoded together

    @property
    def calibrates(self) -> bool:
        """Whether low-loss positions are looked at now, for the fork threshold."""
        return self.quartile is not None and self.quartile.due(self.step)

    def calibration(self, name: str) -> AbstractContextManager[None]:
        """A `Stage` that counts everything as calibration."""
        return self.stage("calibration")

    def of(self, rollouts: slice) -> StepContext:
        """The same for some of the rollouts."""
        return replace(self, sampled=None if self.sampled is None else self.sampled[rollouts])


# --------------------------------------------------------------------------------------------- what looking ahead finds


@dataclass(frozen=True)
class Futures:
    """The two near futures at each of several places, and the transport between them."""

    places: Places  # where both windows start
    ours: Windows  # the student's
    theirs: Windows  # the teacher's
    transport: Transport  # distance D_OT and plan, from the student's window (rows) to the teacher's (columns)

    @property
    def distance(self) -> Tensor:
        """[place] D_OT; NaN where there is none."""
        return self.transport.distance

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: Tensor) -> Futures:
        transport = Transport(*(values[which] for values in self.transport))
        return Futures(self.places[which], self.ours[which], self.theirs[which], transport)

    @classmethod
    def cat(cls, parts: Sequence[Futures]) -> Futures:
        """Futures of several batches as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            Places.cat([part.places for part in parts]),
            Windows.cat([part.ours for part in parts]),
            Windows.cat([part.theirs for part in parts]),
            Transport(*map(torch.cat, zip(*(part.transport for part in parts), strict=True))),
        )


@dataclass(frozen=True)
class Look:
    """What student and teacher make of rollouts."""

    token_loss: Tensor  # [rollout, position] nats
    entropy: Tensor  # [rollout, position] of the student, nats
    student_nll: Tensor  # [rollout, position] -log p_S of the sampled token, nats
    teacher_states: dict[str, Tensor]  # `Prefill.states` of the teacher, kept so that it reads the rollouts once
    candidates: Futures  # futures at the high-loss positions
    low_loss: Futures | None  # futures at low-loss positions, where the fork threshold is being estimated; else None

    @classmethod
    def cat(cls, waves: Sequence[Look]) -> Look:
        """Several waves of rollouts as one batch. Waves may differ in size."""
        if len(waves) == 1:
            return waves[0]
        low_loss = [wave.low_loss for wave in waves if wave.low_loss is not None]
        names = waves[0].teacher_states
        return cls(
            torch.cat([wave.token_loss for wave in waves]),
            torch.cat([wave.entropy for wave in waves]),
            torch.cat([wave.student_nll for wave in waves]),
            {name: torch.cat([wave.teacher_states[name] for wave in waves]) for name in names},
            Futures.cat([wave.candidates for wave in waves]),
            Futures.cat(low_loss) if low_loss else None,
        )


@dataclass(frozen=True)
class NearFuture:
    """What looking ahead found in a batch of rollouts, and what it decided."""

    look: Look  # scores, and futures at the candidates
    threshold: float  # D_OT above which a candidate is a fork
    fork: Tensor  # [candidate] True at forks, False at false alarms
    guided: Tensor  # [candidate] True where the trajectory loss applies
    capped: Tensor  # [candidate] True where the token loss is capped
    weights: Tensor  # [rollout, position] of the token losses; 1 unless capped

    @property
    def candidates(self) -> Futures:
        """Futures at the candidates."""
        return self.look.candidates

    @property
    def chosen(self) -> Futures:
        """Futures at the candidates where the trajectory loss applies."""
        return self.candidates[self.guided.nonzero().squeeze(-1)]


# --------------------------------------------------------------------------------------------- which positions it takes


def choose_candidates(
    scores: TokenScores, rollouts: Rollouts, method: Method, max_per_rollout: int | None = None
) -> Places:
    """High-loss positions; the control "random" takes equally many positions of each rollout at random instead."""
    order, mask = ranking(scores, method.candidate_ranking), rollouts.loss_mask.bool()
    if method.guides and method.guidance_at == "random":
        order = torch.rand(order.shape, device=order.device)
    chosen = highest_loss(order, mask, share=method.candidate_share)
    if max_per_rollout is not None:
        chosen &= highest_loss(order, mask, share=None, count=max_per_rollout)
    return Places.marked(rollouts, chosen)


def ranking(scores: TokenScores, kind: Ranking) -> Tensor:
    """[rollout, position] what makes a position high-loss (nats)."""
    if kind == "teacher_nll":
        return scores.teacher_nll
    return scores.teacher_nll - scores.student_nll if kind == "log_ratio" else scores.kl


def choose_low_loss(token_loss: Tensor, candidates: Places) -> Places:
    """The positions with the lowest token loss, as many in each rollout as it has candidates, at most `LOW_LOSS`."""
    rollouts, chosen = candidates.rollouts, torch.zeros_like(token_loss, dtype=torch.bool)
    mask, counts = rollouts.loss_mask.bool(), torch.bincount(candidates.rows, minlength=len(rollouts))
    for row, count in enumerate(counts.clamp(max=LOW_LOSS).tolist()):
        if count:
            chosen[row] = highest_loss(-token_loss[row : row + 1], mask[row : row + 1], share=None, count=count)[0]
    return Places.marked(rollouts, chosen)


def choose_capped(fork: Tensor, candidates: Futures, method: Method, context: StepContext) -> Tensor:
    """Whose token loss is capped: false alarms, or the bottom share by rank over all processes, or its controls.

    The random control draws by the step alone, so that all processes draw the same.
    """
    distance = candidates.distance
    if method.caps is None or method.caps == "false_alarms":
        return ~fork & distance.isfinite() if method.caps else torch.zeros_like(fork)
    owner = context.gather(torch.full_like(distance, context.process))
    generator = torch.Generator().manual_seed(context.step)
    chosen = select_for_capping(context.gather(distance), method.caps, method.false_alarm_share, generator)
    return chosen[owner == context.process]


def choose_guided(fork: Tensor, candidates: Futures, method: Method) -> Tensor:
    """Where the trajectory loss applies: at forks; the control "false_alarms" takes the others."""
    if not method.guides:
        return torch.zeros_like(fork)
    return candidates.transport.converged & ~fork if method.guidance_at == "false_alarms" else fork


def random_tokens(mask: Tensor, share: float, seed: Sequence[int], first: int) -> Tensor:
    """Mark a random share of each rollout's tokens, at least one: the control `token_share` of plain OPD.

    Which ones depends on `seed` and on the rollout's number in the batch of all processes, so it is the same however
    the batch is split, padded or resumed, and takes nothing from the random numbers that rollouts are sampled with (our
    choice).

    Args:
        mask: [rollout, position] the response tokens.
        share: of each rollout's tokens, in (0, 1]; rounded to the nearest number.
        seed: whole numbers of the run and of the batch, not negative.
        first: number of the first rollout here.

    Returns:
        [rollout, position], True at the tokens that are kept.
    """
    rows = range(first, first + len(mask))
    order = [numpy.random.default_rng([*seed, row]).random(mask.shape[1], numpy.float32) for row in rows]
    return highest_loss(torch.from_numpy(numpy.stack(order)).to(mask.device), mask, share=share)


# --------------------------------------------------------------------------------------------------- the fork threshold


def fork_threshold(look: Look, method: Method, context: StepContext) -> float:
    """D_OT above which a candidate is a fork, by `fork_rule`, over all processes. Updates `context.quartile`."""
    if method.fork_rule == "threshold":
        assert method.fork_threshold is not None
        return method.fork_threshold
    if context.quartile is None:
        return false_alarm_threshold(context.gather(look.candidates.distance), method.false_alarm_share)
    if look.low_loss is not None:
        context.quartile.add(context.step, context.gather(look.low_loss.distance))
    return context.quartile.value


LOW_LOSS = 16
"""Low-loss positions per rollout that the fork threshold is estimated from, at most (our choice)."""
WANTED = 512
"""Distances at low-loss positions that one estimate rests on: a standard error of some 0.02 in the quantile's rank."""
MOST_STEPS = 8
"""Steps that an estimate may take; with small batches it rests on fewer distances."""


@dataclass
class LowLossQuartile:
    """Collects D_OT at low-loss positions in the first steps, and anew every `every` steps (our choice).

    Args:
        every: batches of rollouts (the steps counted here) from one estimate to the next.
    """

    every: int
    value: float = math.nan
    _distances: list[float] = field(default_factory=list)
    _steps: int = 0

    def due(self, step: int) -> bool:
        """Whether low-loss positions are looked at in this step (from 0)."""
        return step % self.every < MOST_STEPS and (step % self.every == 0 or self._steps > 0)

    def add(self, step: int, distance: Tensor) -> None:
        """Add a step's distances, of all processes; NaN is left out.

        The first estimate is used from its first step on; a later one replaces it once it is complete.
        """
        if step % self.every == 0 and (self._steps == 0 or self.every > MOST_STEPS):
            self._distances, self._steps = [], 0
        self._steps += 1
        self._distances += distance[distance.isfinite()].tolist()
        complete = len(self._distances) >= WANTED or self._steps >= MOST_STEPS
        if complete or math.isnan(self.value) or step < MOST_STEPS:
            self.value = low_loss_threshold(torch.tensor(self._distances))
        if complete:
            self._steps = 0
