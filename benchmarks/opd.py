"""A plain OPD optimiser step: 8 prompts x 128 new tokens, sampling, scoring, loss, backward and AdamW.

Timed is what each trainer does between the callbacks `on_step_begin` and `on_step_end` of `train()`; constructing the
trainer and its first step are not. All trainers start from copies of the same two random Qwen3 models and the same
prompts, with the same optimiser settings, and draw with the same seed at each step. Trainers take turns by short runs.
Sides:

- ours: `topd.TOPDTrainer(method="opd")`: "trl" (`opd_loss="trl"`), which is DistillationTrainer's code and equals it
  bit for bit, and "one pass" (`opd_loss="one_pass"`), our own loss, the default on a CPU.
- TRL DistillationTrainer: TRL 1.16, the code that ours inherits.
- TRL GKDTrainer: `trl.experimental.gkd` with lmbda 1, beta 1, temperature 1, seq_kd off: the same loss from full
  logits.

Parity: the first step's loss equals DistillationTrainer's within 1e-5 (relative). GKD's is reported: it divides by the
tokens of the dataset's own completions, which are made 128 long here, so that the losses can be compared.

"trl" beside DistillationTrainer is the same code on both sides, so that ratio is 1 but for noise: it passes when
the lower quartile of the repeats' ratios is at most its gate of 1.0.
"""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import Timing, interleave, require
from benchmarks.models import prompts, random_model, tokenizer
from benchmarks.row import Row, time_row
from topd import TOPDConfig, TOPDTrainer

OURS: dict[str, dict[str, Any]] = {
    "trl": {"method": "opd", "opd_loss": "trl"},
    "one pass": {"method": "opd", "opd_loss": "one_pass"},
}
"""Variants of ours: options of `TOPDConfig`."""

DISTILLATION, GKD = "TRL DistillationTrainer", "TRL GKDTrainer"
GATES = {DISTILLATION: 1.0, GKD: 0.9}
PARITY = 1e-5
WHAT = "one optimiser step of plain OPD, generation included"


class Plan(NamedTuple):
    vocabulary: int
    prompts: int
    tokens: int
    steps: int
    repeats: int


SIZES: dict[Size, list[Plan]] = {
    "tiny": [Plan(512, 2, 8, steps=1, repeats=1)],
    "quick": [Plan(8192, 8, 128, steps=1, repeats=3)],
    "full": [Plan(8192, 8, 128, steps=3, repeats=8), Plan(32768, 8, 128, steps=2, repeats=4)],
}


class Watch(TrainerCallback):
    """Seconds and loss of each step; the same random numbers for every trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        torch.manual_seed(1000 + state.global_step)
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def follow(self, trainer: Any) -> None:
        """Keep what `training_step` returns."""
        training_step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

        trainer.training_step = watched
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)


class Setting:
    """Models and data that every trainer starts from."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tokenizer = tokenizer()
        self.student = random_model(plan.vocabulary, width=128, layers=3, seed=0)
        self.teacher = random_model(plan.vocabulary, width=160, layers=4, seed=1)
        answer = "1" * (plan.tokens - 1)  # one token each; the chat template adds EOS
        self.dataset = Dataset.from_list([
            {"prompt": text, "messages": [_turn("user", text), _turn("assistant", answer)]}
            for text in prompts(plan.prompts)
        ])  # fmt: skip

    def shared(self, out: str, steps: int) -> dict[str, Any]:
        """Options that all of the trainers have."""
        return {
            "output_dir": out,
            "per_device_train_batch_size": self.plan.prompts,
            "max_steps": steps,
            "learning_rate": 1e-5,
            "temperature": 1.0,
            "beta": 1.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "seed": 0,
        }

    def models(self) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
        return copy.deepcopy(self.student), copy.deepcopy(self.teacher)

    def distillation(self, trainer: type, config: type, options: dict[str, Any], out: str, steps: int) -> Any:
        """TRL's trainer, or ours, which takes the same."""
        student, teacher = self.models()
        args = config(max_completion_length=self.plan.tokens, **self.shared(out, steps), **options)
        data = self.dataset.select_columns("prompt")
        return trainer(student, teacher, args, train_dataset=data, processing_class=self.tokenizer)

    def gkd(self, out: str, steps: int) -> Any:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        student, teacher = self.models()
        args = GKDConfig(max_new_tokens=self.plan.tokens, lmbda=1.0, seq_kd=False, **self.shared(out, steps))
        return GKDTrainer(student, teacher, args, train_dataset=self.dataset, processing_class=self.tokenizer)

    def sides(self) -> dict[str, Callable[[str, int], Any]]:
        sides: dict[str, Callable[[str, int], Any]] = {
            name: partial(self.distillation, TOPDTrainer, TOPDConfig, options) for name, options in OURS.items()
        }
        sides[DISTILLATION] = partial(self.distillation, DistillationTrainer, DistillationConfig, {})
        sides[GKD] = self.gkd
        return sides


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def train(build: Callable[[str, int], Any], steps: int) -> Watch:
    """A fresh trainer, a first step that only warms up, then `steps` more."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as out:
        trainer = build(out, 1 + steps)
        watch.follow(trainer)
        trainer.train()
    return watch


def seconds_a_step(build: Callable[[str, int], Any], steps: int) -> float:
    return statistics.median(train(build, steps).seconds[1:])


def rows(size: Size) -> Iterable[Row]:
    for name in ("trl", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for plan in SIZES[size]:
        say(f"opd: V={plan.vocabulary}, {plan.prompts} x {plan.tokens} tokens")
        yield from _compare(plan)


def _compare(plan: Plan) -> Iterator[Row]:
    sides = Setting(plan).sides()
    losses = {name: train(build, 0).losses[0] for name, build in sides.items()}
    for name in OURS:
        require(f"{name}: first loss beside {DISTILLATION}", _apart(losses, name, DISTILLATION), PARITY)
    calls = {name: partial(seconds_a_step, build, plan.steps) for name, build in sides.items()}
    timing = interleave(calls, plan.repeats, warmup=0, clock=lambda side: side())
    for name in OURS:
        for beside in (DISTILLATION, GKD):
            yield _row(plan, timing, name, beside, _apart(losses, name, beside))


def _apart(losses: dict[str, float], ours: str, beside: str) -> float:
    return abs(losses[ours] - losses[beside]) / abs(losses[beside])


def _row(plan: Plan, timing: Timing, ours: str, beside: str, apart: float) -> Row:
    size = f"V={plan.vocabulary}, {plan.prompts} x {plan.tokens} tokens, {ours}"
    gate = None if (ours, beside) == ("trl", GKD) else GATES[beside]
    row = time_row("opd", beside, timing, ours=ours, size=size, what=WHAT, gate=gate, parity=f"first loss {apart:.1e}")
    if (ours, beside) == ("trl", DISTILLATION) and row.spread is not None:
        row.ok = row.spread[0] <= GATES[DISTILLATION]
        row.note = "the same code on both sides: passes when the lower quartile of the ratios is at most the gate"
    return row
