"""Several updates per batch of rollouts (`num_iterations`): time of an optimiser step, beside OPD's.

The models, rollouts and stages of the case "step", with `student_window: rollout`. A batch of rollouts is sampled, read
by the teacher and, in ours, looked ahead from once; each update then computes the student's loss and its gradient. Time
is that of the whole batch divided by its updates, in CPU seconds of all threads. Sides:

- OPD, 1 update: the usual step, sampling included.
- OPD, as many updates: the same number of updates as ours.

Parity: a second update on the same weights has the loss of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import Timing, process_clock, require
from benchmarks.row import Row, time_row
from benchmarks.step import Pair, Plan
from topd.near_future import Rollouts
from topd.near_future.sampling import SamplingStates
from topd.training.losses import guided_windows, sampled_log_probs
from topd.training.method import Method, StepContext
from topd.training.step import look_ahead

WHAT = "one optimiser step, its share of sampling and looking ahead included"
UPDATES = (1, 2, 4)

SIZES: dict[Size, list[Plan]] = {
    "tiny": [Plan(2, 48, 6, 1, 0)],
    "quick": [Plan(4, 512, 50, 1, 0)],
    "full": [Plan(4, 1024, 50, 2, 0), Plan(2, 4096, 50, 1, 0)],
}


def rows(size: Size) -> Iterable[Row]:
    for plan in SIZES[size]:
        say(f"updates: {plan.rollouts} rollouts of {plan.length}")
        yield from _compare(Batch(plan))


class Batch(Pair):
    """A batch of rollouts: what happens once, and an update."""

    def once(self, rollouts: Rollouts, kept: SamplingStates | None, method: Method | None) -> dict[str, Any]:
        """What an update needs besides the rollouts: of OPD, or of ours with a method."""
        student, teacher = self.distilled(self.student), self.distilled(self.teacher)
        ones = torch.ones(rollouts.response_ids.shape, device=rollouts.response_ids.device)
        if method is None:
            return {"states": {"hidden": teacher.hidden(rollouts)}, "weights": ones, "guided": None}
        sampled = kept.prefill(rollouts, keep_prefix=False) if kept else None
        future = look_ahead(rollouts, student, teacher, method, StepContext(self._stage, sampled=sampled))
        guided = guided_windows(future.chosen, method)
        return {"states": future.look.teacher_states, "weights": future.weights, "guided": guided}

    def update(self, rollouts: Rollouts, found: dict[str, Any], method: Method) -> float:
        student, teacher = self.distilled(self.student), self.distilled(self.teacher)
        return self._train(rollouts, student, teacher, found["states"], found["weights"], found["guided"], method)

    def weigher(self, rollouts: Rollouts) -> Callable[[], Any]:
        """What `prefix_weight_max` adds to an update: log-probabilities of the sampled tokens."""
        student = self.distilled(self.student)
        states = student.hidden(rollouts)[rollouts.loss_mask.bool()]
        return lambda: sampled_log_probs(states, student.head(), rollouts)


def _compare(batch: Batch) -> Iterable[Row]:
    method, most = Method.of(batch.config()), max(UPDATES)
    seconds: dict[str, list[list[float]]] = {"OPD": [], "ours": []}  # of each repeat: once, then each update
    weighing, parity = [], ""
    for _ in range(batch.plan.repeats):
        sampled: list[Any] = []
        sampling = process_clock(lambda sampled=sampled: sampled.extend(batch.sample()))  # type: ignore[misc]
        rollouts, kept = sampled
        for name, using in (("OPD", None), ("ours", method)):
            found: dict[str, Any] = {}
            losses: list[float] = []

            def once(found: Any = found, using: Any = using, rollouts: Any = rollouts, kept: Any = kept) -> None:
                found |= batch.once(rollouts, kept, using)

            def update(found: Any = found, losses: Any = losses, rollouts: Any = rollouts) -> None:
                losses.append(batch.update(rollouts, found, method))

            batch.once(rollouts[:1], None, using)  # warms up, as does the first update
            first = sampling + process_clock(once)
            update()
            seconds[name].append([first, *(process_clock(update) for _ in range(most))])
            parity = require("loss of a second update", abs(losses[1] / losses[0] - 1), 1e-6)
        weighing.append(process_clock(batch.weigher(rollouts)))
    note = f"prefix_weight_max adds {sorted(weighing)[len(weighing) // 2]:.2f} s to an update"
    yield from _rows(batch.plan, seconds, parity, note)


def _rows(plan: Plan, seconds: dict[str, list[list[float]]], parity: str, note: str) -> Iterable[Row]:
    def step(name: str, updates: int) -> list[float]:
        return [(first + sum(each[:updates])) / updates for first, *each in seconds[name]]

    for updates in UPDATES:
        size = f"{plan.rollouts} x T={plan.length}, num_iterations {updates}"
        beside = {"OPD, 1 update": step("OPD", 1)}
        if updates > 1:
            beside["OPD, as many updates"] = step("OPD", updates)
        for other, values in beside.items():
            timing = Timing({"ours": step("ours", updates), other: values})
            yield time_row("updates", other, timing, size=size, what=WHAT, parity=parity, note=note)
