"""A TOPD step over an OPD step: 2.25 % of the positions as candidates, K = 50, rollouts of 1,024 and 4,096 tokens.

One optimiser step of each, with the functions that the trainer calls: sample the rollouts (transformers' `generate`;
sampled once a repeat and shared by the sides, for it is the same code in all of them), score, look ahead, loss,
backward. Student and teacher are random Qwen3 models of one shape (the paper's teacher computes with 3 B parameters a
token, its student with 4 B) that never end a response, so every rollout has full length and no window follows its
rollout for free: the worst case. Sides:

- OPD step: sampling, the teacher's forward, the loss in one pass, backward. The same loss code as ours.
- literal: the method as one would write it down: both windows by `generate` from fresh prefixes, a batch at a time,
  windows as separate sequences, one transport problem at a time with POT, a student forward for scoring.

`rollout` and `regenerated` are `student_window`. "learning only" leaves the sampling out of both sides: the strictest
view, in which what TOPD adds weighs most. Beside "literal", the ratio is of what each adds to the OPD step.

Parity: loss and gradient of literal and ours on one rollout, 3 candidates, targets "same_index" (where a window repeats
a token, equally cheap plans exist, and POT takes another than ours).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import ot
import torch
from torch import Tensor

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import Timing, relative_difference, require, wall_clock
from benchmarks.models import random_model
from benchmarks.row import Row, time_row
from topd.algorithm import Transport
from topd.near_future import DistilledModel, LocalModel, Prefill, Rollouts, branches
from topd.near_future.branches import separate
from topd.near_future.sampling import SamplingStates
from topd.training import TOPDConfig, step
from topd.training.losses import LossInputs, guided_windows
from topd.training.method import Method, StepContext
from topd.training.step import look_ahead, topd_loss

WHAT = "one optimiser step, stages as the trainer runs them"
VOCABULARY, PROMPT, PAD = 8192, 16, 0
GATES = {"rollout": 1.10, "regenerated": 1.41}
LITERAL = 0.1


class Plan(NamedTuple):
    rollouts: int
    length: int
    window: int
    repeats: int
    literal: int  # repeats of the literal side


SIZES: dict[Size, list[Plan]] = {
    "tiny": [Plan(2, 48, 6, 1, 1)],
    "quick": [Plan(4, 512, 50, 1, 0)],
    "full": [Plan(4, 1024, 50, 5, 1), Plan(2, 4096, 50, 2, 0)],
}


def rows(size: Size) -> Iterable[Row]:
    for plan in SIZES[size]:
        say(f"step: {plan.rollouts} rollouts of {plan.length}")
        yield from _compare(Pair(plan))


class Pair:
    """Student, teacher, and the steps that are compared."""

    def __init__(self, plan: Plan, student: Any = None, teacher: Any = None, vocabulary: int = VOCABULARY) -> None:
        self.plan = plan
        self.student = student or random_model(VOCABULARY, width=256, layers=6, seed=0, positions=2 * plan.length)
        self.teacher = teacher or random_model(VOCABULARY, width=256, layers=6, seed=1, positions=2 * plan.length)
        self.teacher.eval()
        torch.manual_seed(2)
        self.prompts = torch.randint(3, vocabulary, (plan.rollouts, PROMPT), device=self.student.device)
        self.stages: dict[str, float] = {}

    def config(self, student_window: Literal["rollout", "regenerated"] = "rollout") -> TOPDConfig:
        return TOPDConfig(
            "unused", student_window=student_window, window_length=self.plan.window, bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip

    def distilled(self, model: Any, share_prefix: bool = True) -> DistilledModel:
        return DistilledModel(model, LocalModel(model, PAD, []), share_prefix=share_prefix)

    @torch.no_grad()
    def sample(self) -> tuple[Rollouts, SamplingStates]:
        states = SamplingStates()
        with states.keeping(self.student):
            output = self.student.eval().generate(
                input_ids=self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=True, top_k=0,
                max_new_tokens=self.plan.length, min_new_tokens=self.plan.length, pad_token_id=PAD, eos_token_id=None,
            )  # fmt: skip
        response = output[:, PROMPT:]
        ones = torch.ones_like(response)
        return Rollouts(self.prompts, torch.ones_like(self.prompts), response, ones, ones), states

    def opd(self, rollouts: Rollouts) -> float:
        student, teacher = self.distilled(self.student), self.distilled(self.teacher)
        ones = torch.ones(rollouts.response_ids.shape, device=rollouts.response_ids.device)
        states = {"hidden": teacher.hidden(rollouts)}
        return self._train(rollouts, student, teacher, states, ones, None, Method.of(self.config()))

    def topd(self, rollouts: Rollouts, kept: SamplingStates | None, options: TOPDConfig) -> float:
        student, teacher = self.distilled(self.student), self.distilled(self.teacher)
        sampled = kept.prefill(rollouts, options.student_window == "regenerated") if kept else None
        return self._look_and_train(rollouts, student, teacher, sampled, Method.of(options))

    def literal(self, rollouts: Rollouts, options: TOPDConfig) -> float:
        """Fresh prefixes, separate sequences, one transport problem at a time."""
        student, teacher = (self.distilled(model, share_prefix=False) for model in (self.student, self.teacher))
        with patch.object(step, "exact_transport", pot_one_by_one), patch.object(branches, "packed", in_turn):
            return self._look_and_train(rollouts, student, teacher, None, Method.of(options))

    def _look_and_train(
        self, rollouts: Rollouts, student: DistilledModel, teacher: DistilledModel, sampled: Prefill | None,
        method: Method,
    ) -> float:  # fmt: skip
        self.student.eval()
        future = look_ahead(rollouts, student, teacher, method, StepContext(self._stage, sampled=sampled))
        guided = guided_windows(future.chosen, method)
        return self._train(rollouts, student, teacher, future.look.teacher_states, future.weights, guided, method)

    def _train(self, rollouts: Rollouts, student: Any, teacher: Any, states: dict[str, Tensor], weights: Tensor,
               guided: Any, method: Method) -> float:  # fmt: skip
        self.student.train().zero_grad(set_to_none=True)
        num_forks = guided.targets.guided.any(-1).sum() if guided is not None else rollouts.loss_mask.sum()
        inputs = LossInputs(states, rollouts.loss_mask.sum(), weights, guided, num_forks.clamp(min=1))
        with self._stage("loss"):
            loss = topd_loss(rollouts, student, teacher, inputs, method).loss
        with self._stage("backward"):
            loss.backward()
        return float(loss.detach())

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return Stage(self.stages, name)


class Stage(nullcontext):  # type: ignore[type-arg]
    """Adds the seconds of a block to a dictionary."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        super().__init__()
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = self.into.get(self.name, 0.0) + time.perf_counter() - self.started


def in_turn(backbone: Any, rollouts: Rollouts, windows: Any) -> tuple[Tensor, Tensor]:
    """In the place of `packed`: separate sequences."""
    return separate(backbone, rollouts, windows)


def pot_one_by_one(cost: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Transport:
    """The exact plans, one `ot.emd` after the other."""
    plans = []
    for one, rows, columns in zip(cost, student_mask.sum(1).tolist(), teacher_mask.sum(1).tolist(), strict=True):
        plan = torch.zeros_like(one)
        block = one[:rows, :columns].double().numpy()
        plan[:rows, :columns] = torch.from_numpy(ot.emd([], [], block)).to(plan.dtype)
        plans.append(plan)
    plan = torch.stack(plans)
    good = torch.ones(len(plan), dtype=torch.bool)
    return Transport(plan, (plan * cost).sum((1, 2)), good, torch.zeros(len(plan)))


def _compare(pair: Pair) -> Iterable[Row]:
    sampled = pair.sample()
    yield from measured(pair, _parity(pair, *sampled), sampled)


def measured(pair: Pair, parity: str, sampled: tuple[Rollouts, SamplingStates]) -> Iterable[Row]:
    """Each side once on `sampled` to warm up; then, each repeat, sampling anew and each side on those rollouts."""
    plan = pair.plan
    rollout, regenerated = pair.config("rollout"), pair.config("regenerated")
    sides: dict[str, Callable[[Rollouts, SamplingStates], float]] = {
        "OPD": lambda rollouts, kept: pair.opd(rollouts),
        "rollout": lambda rollouts, kept: pair.topd(rollouts, kept, rollout),
        "regenerated": lambda rollouts, kept: pair.topd(rollouts, kept, regenerated),
    }
    for side in sides.values():
        side(*sampled)
    seconds: dict[str, list[float]] = {name: [] for name in ("sampling", *sides, "literal")}
    stages: dict[str, dict[str, float]] = {name: {} for name in sides}
    for repeat in range(plan.repeats):

        def sample() -> None:
            nonlocal sampled
            sampled = pair.sample()

        seconds["sampling"].append(wall_clock(sample))
        for name, side in sides.items():
            pair.stages = stages[name]
            seconds[name].append(wall_clock(lambda side=side: side(*sampled)))  # type: ignore[misc]
        if repeat < plan.literal:
            pair.stages = {}
            seconds["literal"].append(wall_clock(lambda: pair.literal(sampled[0], regenerated)))
    yield from _rows(plan, seconds, stages, parity)


def _rows(
    plan: Plan, seconds: dict[str, list[float]], stages: dict[str, dict[str, float]], parity: str
) -> Iterable[Row]:
    at = f"{plan.rollouts} x T={plan.length}"
    whole = {name: [a + b for a, b in zip(seconds["sampling"], seconds[name], strict=True)] for name in stages}
    shares = sorted(a / b for a, b in zip(seconds["sampling"], whole["OPD"], strict=True))
    note = f"sampling is {shares[len(shares) // 2]:.0%} of the OPD step"
    for name, gate in GATES.items():
        timing = Timing({"ours": whole[name], "OPD step": whole["OPD"]})
        per_stage = ", ".join(f"{stage} {total / plan.repeats:.2f} s" for stage, total in stages[name].items())
        size = f"{at}, {name}"
        yield time_row("step", "OPD step", timing, size=size, what=WHAT, gate=gate, parity=parity,
                       note=f"{note}; {per_stage}")  # fmt: skip
        only = Timing({"ours": seconds[name], "OPD step": seconds["OPD"]})
        yield time_row("step", "OPD step", only, size=f"{size}, learning only", what=WHAT, parity=parity)
        if seconds["literal"]:
            n = len(seconds["literal"])
            added = {
                side: [a - b for a, b in zip(seconds[side][:n], seconds["OPD"][:n], strict=True)]
                for side in (name, "literal")
            }
            yield time_row("step", "literal", Timing({"ours": added[name], "literal": added["literal"]}), size=size,
                           what="what is added to the OPD step", gate=LITERAL, parity=parity)  # fmt: skip


def _parity(pair: Pair, rollouts: Rollouts, kept: SamplingStates) -> str:
    """The first rollout alone, ours and literal, with targets that do not depend on which of equal plans is taken."""
    one, options = rollouts[:1], pair.config("regenerated")
    options.candidate_share, options.guidance_target = 3 / one.response_ids.shape[1], "same_index"
    sampled = kept.prefill(rollouts, keep_prefix=True)
    assert sampled is not None
    student, teacher = pair.distilled(pair.student), pair.distilled(pair.teacher)
    ours = pair._look_and_train(one, student, teacher, sampled[:1], Method.of(options))
    gradient = _gradient(pair.student)
    literal = pair.literal(one, options)
    require("loss", abs(ours - literal) / abs(literal), 1e-5)
    return require("gradient", relative_difference(gradient, _gradient(pair.student)), 1e-3)


def _gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
