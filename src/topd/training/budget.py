"""A budget: how many candidates per rollout keep the step-time overhead over plain OPD within a limit.

The first steps measure the pair on the machine it runs on. One warms up; then steps without looking ahead, with all
candidates and with half of them take turns. Apart from sampling the rollouts, which costs both methods the same, a
step takes

    seconds / response tokens = plain                                      without looking ahead
                              = plain + fixed + each * candidates / tokens   else

and the share of candidates is the highest whose predicted overhead over the whole step, sampling included, is within
the budget. Our choice; the paper does not limit its cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy

ROUNDS = ("warm-up", "plain", "all", "half", "plain", "all", "half", "plain", "all", "half")
"""What each of the first steps does."""


@dataclass(frozen=True)
class CostModel:
    """Seconds per response token."""

    sampling: float  # of the rollout
    plain: float  # of the rest of an OPD step
    fixed: float  # what looking ahead adds, whatever the number of candidates
    each: float  # what every candidate adds (seconds per candidate)

    def overhead(self, candidates_per_token: float) -> float:
        """Predicted time over that of an OPD step, as a share of it."""
        if candidates_per_token == 0:
            return 0.0
        return (self.fixed + self.each * candidates_per_token) / (self.sampling + self.plain)

    def candidates_per_token(self, max_overhead: float) -> float:
        """The most candidates within the budget; negative where even none would be."""
        allowed = max_overhead * (self.sampling + self.plain) - self.fixed
        return allowed / self.each if self.each > 0 else numpy.copysign(numpy.inf, allowed)


@dataclass
class CandidateBudget:
    """Turns `max_overhead` into a number of candidates per rollout, once the first steps have been measured."""

    max_overhead: float
    calibration_every: int = 50
    model: CostModel | None = None
    per_rollout: int | None = None
    _measured: list[tuple[str, float, float, float]] = field(default_factory=list)
    _rollouts: float = 1.0
    _usual: int = 1
    _calibration: float = 0.0

    @property
    def measuring(self) -> bool:
        return self.model is None

    def max_candidates(self) -> int | None:
        """Candidates per rollout in the next step: None, all; 0, do not look ahead."""
        if not self.measuring:
            return self.per_rollout
        kind = ROUNDS[len(self._measured)]
        return {"warm-up": None, "plain": 0, "all": None, "half": max(1, self._usual // 2)}[kind]

    def record(self, seconds: Mapping[str, float], tokens: float, rollouts: float, candidates: float) -> None:
        """Record the `seconds` of a step by stage, "rollout" among them.

        Tokens, rollouts and candidates are those of this process, or averages over processes, so that all decide alike.
        """
        if not self.measuring:
            return
        kind = ROUNDS[len(self._measured)]
        sampling, calibration = seconds.get("rollout", 0.0), seconds.get("calibration", 0.0)
        rest = sum(seconds.values()) - sampling - calibration
        self._calibration += calibration / tokens
        self._measured.append((kind, sampling / tokens, rest / tokens, candidates / tokens))
        if kind in ("warm-up", "all"):
            self._usual = max(1, round(candidates / rollouts))
        if len(self._measured) == len(ROUNDS):
            self.model = self._fit()
            share = self.model.candidates_per_token(self.max_overhead)
            affordable = min(share * tokens / rollouts, self._usual)  # infinite, if candidates seem to cost nothing
            self.per_rollout = int(max(1, affordable))

    def restored(self, state: dict[str, Any]) -> CandidateBudget:
        """What `asdict` of an earlier one said, if it had the same limit: a resumed run does not measure again."""
        if state["max_overhead"] != self.max_overhead:
            return self
        model = state["model"] and CostModel(**state["model"])
        measured = [tuple(row) for row in state["_measured"]]
        return CandidateBudget(**state | {"model": model, "_measured": measured})

    def _fit(self) -> CostModel:
        kinds = numpy.array([kind for kind, *_ in self._measured])
        sampling, rest, share = numpy.array([row[1:] for row in self._measured]).T
        plain = float(numpy.median(rest[kinds == "plain"]))
        looking = numpy.isin(kinds, ("all", "half"))
        design = numpy.stack([numpy.ones(looking.sum()), share[looking]], axis=1)
        (fixed, each), *_ = numpy.linalg.lstsq(design, rest[looking] - plain, rcond=None)
        fixed += self._calibration / self.calibration_every  # what the fork threshold costs, spread over its steps
        return CostModel(float(numpy.median(sampling[1:])), plain, float(fixed), float(each))


def budget_message(budget: CandidateBudget, tokens_per_rollout: float) -> str:
    """What was decided, for the user."""
    assert budget.model is not None
    assert budget.per_rollout is not None
    overhead = budget.model.overhead(budget.per_rollout / tokens_per_rollout)
    decided = f"{budget.per_rollout} candidates per rollout, predicted {overhead:.1%} over plain OPD"
    if overhead > budget.max_overhead:
        return (
            f"max_overhead {budget.max_overhead:.0%} cannot be met: one candidate per rollout is predicted to cost "
            f"{overhead:.1%}; using {decided}. Longer rollouts or student_window=rollout make looking ahead cheaper."
        )
    return f"max_overhead {budget.max_overhead:.0%}: {decided}."
