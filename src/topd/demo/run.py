"""`topd demo`: distil the embedded student by OPD and by TOPD from the same start, and compare.

Both arms have the same student, teacher, prompts, seed and optimizer steps, and differ only in `method`.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console, Group
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from topd.analysis.probe import ProbeOptions
from topd.analysis.probe_command import ProbeRun, run_probe
from topd.embedded.pair import pair_folder
from topd.embedded.task import Problem, make_problems
from topd.evaluation.embedded import MAX_NEW_TOKENS, correct_answers
from topd.evaluation.statistics import bootstrap_mean, paired_difference
from topd.loading.models import load_weights
from topd.loading.tokenizers import tokenizer_of
from topd.runs.console import progress, silence_libraries
from topd.runs.files import write_json
from topd.runs.provenance import PACKAGES, versions
from topd.runs.records import AUDIT_FILE, EVAL_FILE
from topd.training import TOPDConfig, TOPDTrainer
from topd.training.config import MethodName

ARMS: tuple[MethodName, ...] = ("opd", "topd")


@dataclass(frozen=True)
class Size:
    steps: int
    held_out: int
    sampled: int
    probe_rollouts: int
    batch: int = 32


FULL = Size(steps=40, held_out=500, sampled=2, probe_rollouts=64)
QUICK = Size(steps=6, held_out=150, sampled=1, probe_rollouts=16)
CURVE_PROBLEMS = 100
"""Problems of each point of the curve on the page."""

STUDENT, TEACHER = "long-student", "long-teacher"
WINDOW_LENGTH, CANDIDATE_SHARE, GUIDANCE_WEIGHT = 32, 0.0225, 0.03
"""The task's responses have about 145 tokens, the paper's 9,688, so windows are shorter."""


def run_demo(out: Path, *, quick: bool = False, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Run both arms, print the table, write `results.json` and `report.html` into `out`; return the results."""
    silence_libraries()
    torch.set_num_threads(1)  # models of a megabyte: a second thread does not help
    size = QUICK if quick else FULL
    steps = steps or size.steps
    started, console = time.perf_counter(), Console()
    tokenizer: Any = tokenizer_of(str(pair_folder(STUDENT)))
    held_out = make_problems(size.held_out, seed=1_000_000 + seed, held_out=True, level="long")

    console.print(f"[bold]TOPD demo[/bold]  {STUDENT}, {steps} steps of {size.batch} rollouts, seed {seed}")
    before = _before(tokenizer, held_out, out, size, console)
    correct, arms = {}, []
    for name in ARMS:
        student, arm = _train(name, tokenizer, out / name, size, steps, seed, console)
        with console.status(f"{name}: answering {len(held_out)} held-out problems"):
            correct[name] = _answers(student, tokenizer, held_out, size.sampled, seed)
        arms.append(arm | {how: _interval(values) for how, values in correct[name].items()})

    results = before | {
        "version": 1,
        "arms": arms,
        "difference": {
            how: asdict(paired_difference(correct["topd"][how], correct["opd"][how])) for how in ("greedy", "sampled")
        },
        "overhead": arms[1]["seconds_per_step"] / arms[0]["seconds_per_step"],
        "seconds_total": time.perf_counter() - started,
        "seed": seed,
        "versions": versions((*PACKAGES, "scipy", "POT")),
    }
    write_json(results, out / "results.json")
    console.print(results_table(results))
    try:
        from topd.report.page import write_report

        console.print(f"Open {write_report(out)} to see the forks. Results: {out / 'results.json'}.")
    except ImportError as error:
        console.print(f"No report page: it needs {error.name} (pip install 'topd\\[report]').")
    return results


def _before(
    tokenizer: PreTrainedTokenizerBase, held_out: list[Problem], out: Path, size: Size, console: Console
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of teacher and student, and a probe of the pair, before training."""
    teacher, student = _load(TEACHER), _load(STUDENT)
    with console.status("before training: answering held-out problems"):
        shown = {
            "teacher": {"greedy": _interval(_answers(teacher, tokenizer, held_out, 0, 0)["greedy"])["mean"]},
            "student": {how: _interval(v)["mean"] for how, v in _answers(student, tokenizer, held_out, 1, 0).items()},
        }
    console.print(f"teacher {shown['teacher']['greedy']:.1%}  student {shown['student']['greedy']:.1%} (greedy)")
    shutil.rmtree(out / "probe", ignore_errors=True)
    prompts = make_problems(size.probe_rollouts, seed=7, held_out=False, level="long")
    run = ProbeRun(
        STUDENT, TEACHER, "embedded-long", size.probe_rollouts, size.batch, MAX_NEW_TOKENS["long"], 1.0, False,
        ProbeOptions(CANDIDATE_SHARE, (WINDOW_LENGTH,)),
    )  # fmt: skip
    found = run_probe(
        run, student, teacher, tokenizer,
        [{"prompt_ids": tokenizer(problem.prompt)["input_ids"]} for problem in prompts], out / "probe",
    )  # fmt: skip
    return shown | {"false_alarm_share": found["false_alarm_share"]}


def _train(
    name: MethodName, tokenizer: PreTrainedTokenizerBase, out: Path, size: Size, steps: int, seed: int, console: Console
) -> tuple[Any, dict[str, Any]]:
    """Distil one arm; return the student and its row of the results."""
    for file in (AUDIT_FILE, EVAL_FILE):
        (out / file).unlink(missing_ok=True)
    problems = make_problems(steps * size.batch, seed=seed, held_out=False, level="long")
    trainer = TOPDTrainer(
        model=_load(STUDENT),
        teacher_model=_load(TEACHER),
        args=arm_config(name, out, steps=steps, batch=size.batch, seed=seed),
        train_dataset=Dataset.from_list([{"prompt": problem.prompt} for problem in problems]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    with progress(console, f"{name:5}", steps) as advance:
        trainer.add_callback(_ShowProgress(advance))
        trainer.train()
    trainer.save_model(str(out))
    trainer.save_state()
    times = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    assert trainer.model is not None
    return trainer.model, {"name": name, "steps": steps, "seconds_per_step": sorted(times)[len(times) // 2]}


def arm_config(name: MethodName, out: Path, *, steps: int, batch: int, seed: int) -> TOPDConfig:
    """Options of one arm. Both arms share all but `method`."""
    return TOPDConfig(
        str(out), method=name, window_length=WINDOW_LENGTH, candidate_share=CANDIDATE_SHARE,
        guidance_weight=GUIDANCE_WEIGHT, max_completion_length=MAX_NEW_TOKENS["long"],
        # training
        per_device_train_batch_size=batch, max_steps=steps, learning_rate=5e-4, lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20), adam_beta2=0.98, bf16=False, gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), seed=seed,
        # records
        logging_steps=1, audit_steps=max(1, steps // 6), save_strategy="steps", save_steps=max(1, steps // 2),
        save_total_limit=2, disable_tqdm=True, report_to=[],
        # the curve on the page, of other problems than the final table
        eval_benchmark="embedded-long", eval_benchmark_limit=CURVE_PROBLEMS,
        per_device_eval_batch_size=CURVE_PROBLEMS,
        eval_strategy="steps", eval_steps=max(1, steps // 4), eval_on_start=True,
    )  # fmt: skip


class _ShowProgress(TrainerCallback):
    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.advance(1, f"loss {kwargs['logs']['loss']:.3f}")


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], sampled: int, seed: int
) -> dict[str, list[float]]:
    """For each problem: 1 or 0 for greedy decoding, and the share of correct samples (temperature 1)."""
    torch.manual_seed(seed)
    answers = {"greedy": [float(right) for right in correct_answers(model, tokenizer, problems)]}
    if sampled:
        samples = [correct_answers(model, tokenizer, problems, temperature=1.0) for _ in range(sampled)]
        answers["sampled"] = [sum(of_problem) / sampled for of_problem in zip(*samples, strict=True)]
    return answers


def _interval(values: list[float]) -> dict[str, float]:
    return asdict(bootstrap_mean(values))


def _load(name: str) -> Any:
    return load_weights(str(pair_folder(name)), torch.float32)


def results_table(results: dict[str, Any]) -> Group:
    """Accuracy with 95 % intervals, the paired difference, s/step and the overhead."""
    table = Table(title="Embedded task, held-out problems", title_justify="left")
    for column in ("", "greedy", "sampled", "s/step"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("teacher", f"{results['teacher']['greedy']:.1%}", "", "")
    table.add_row("student before", f"{results['student']['greedy']:.1%}", f"{results['student']['sampled']:.1%}", "")
    for arm in results["arms"]:
        table.add_row(
            f"+ {arm['name'].upper()}, {arm['steps']} steps",
            _with_interval(arm["greedy"]),
            _with_interval(arm["sampled"]),
            f"{arm['seconds_per_step']:.2f}",
        )
    cost = f"A TOPD step takes {results['overhead']:.2f} x an OPD step (paper: 1.41 x); "
    cost += f"{results['seconds_total']:.0f} s in total."
    return Group(table, *(_verdict(how, results["difference"][how]) for how in ("greedy", "sampled")), cost)


def _with_interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def _verdict(how: str, difference: dict[str, float]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    clear = "" if low > 0 or high < 0 else ", not significantly different"
    return (
        f"TOPD - OPD, {how}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}, p = {difference['p']:.3f}, "
        f"n = {difference['n']} problems, one training seed{clear})"
    )
