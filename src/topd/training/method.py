"""What the method is, apart from how it is trained: the choices that the step, the probe and local correction share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from topd.algorithm.forks import PAPER_CANDIDATE_SHARE, PAPER_FALSE_ALARM_SHARE, ForkRule, Selection
from topd.algorithm.guidance import TargetKind
from topd.algorithm.transport import GroundCost
from topd.algorithm.vocabulary import Direction
from topd.near_future.continuations import Prefill
from topd.near_future.windows import Embedding, Solver

if TYPE_CHECKING:
    from topd.training.choices import LowLossQuartile
    from topd.training.config import TOPDConfig

Ranking = Literal["reverse_kl", "teacher_nll", "log_ratio"]
"""What makes a position high-loss: the token loss; the teacher's NLL of the sampled token; log p_S - log p_T of it."""
StudentWindow = Literal["rollout", "candidate", "regenerated"]
"""rollout: the rollout's own next K tokens. candidate: the candidate token, then the student's greedy continuation.
regenerated: the student's greedy continuation of the prefix, whose first token need not be the candidate."""
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
