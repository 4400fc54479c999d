"""One run of a study: one arm, one seed. Its answers are recorded problem by problem."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd.errors import TOPDError, install
from topd.runs.files import write_json
from topd.study.config import ArmPlan, StudyPlan
from topd.study.tasks import Task, task_of

SCRATCH = ".scratch"
"""Suffix of the folder in which a run trains, next to its record."""


@dataclass(frozen=True)
class Job:
    """An arm with a seed."""

    arm: str
    seed: int
    options: dict[str, Any]  # the arm's own, including tuned ones
    steps: int  # optimizer steps
    file: Path  # where its record is written
    held_out: bool = True  # whether it answers the held-out problems, or the tuning problems


def job_of(plan: StudyPlan, arm: ArmPlan, seed: int, options: dict[str, Any], file: Path, steps: int = 0) -> Job:
    """The job of an arm; `options` override the arm's own."""
    return Job(arm.name, seed, arm.options | options, steps or max(1, round(plan.steps * arm.steps_factor)), file)


def known_record(plan: StudyPlan, job: Job, made_of: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The record of an earlier run of the same job with the same settings, models and data, if there is a whole one.

    `made_of`: of the plan, where it is known already.
    """
    try:
        record = json.loads(job.file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("settings") != settings_of(plan, job):
        return None
    now = made_of or what_it_is_made_of(plan)
    same = all(record.get(name, value) == value for name, value in now.items())  # earlier versions did not record them
    return record if same else None


def what_it_is_made_of(plan: StudyPlan, task: Task | None = None) -> dict[str, Any]:
    """Digests of the models and of your own data, which may be others later under the same names."""
    return {"weights": weights_of(plan), "data": (task or task_of(plan)).digest()}


def weights_of(plan: StudyPlan) -> dict[str, str | None]:
    """Digests of both models' folders, which may hold other weights later; None for other names."""
    from topd.evaluation.run import fingerprint

    names = {"student": plan.student, "teacher": plan.teacher}
    return {role: fingerprint(name) if Path(name).is_dir() else None for role, name in names.items()}


def settings_of(plan: StudyPlan, job: Job) -> dict[str, Any]:
    """Everything that a run depends on."""
    own = {"arm": job.arm, "seed": job.seed, "arm_options": job.options, "arm_steps": job.steps}
    return json.loads(json.dumps(plan.settings() | own | {"on_held_out": job.held_out}))


def run_job(plan: StudyPlan, job: Job) -> dict[str, Any]:
    """Train, answer, write and return the record."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback

    from topd.loading.by_name import load_by_name
    from topd.runs.console import silence_libraries
    from topd.study.curve import Curve
    from topd.training import TOPDTrainer

    silence_libraries()
    torch.set_num_threads(1)
    started = time.perf_counter()
    task = task_of(plan)
    made_of = what_it_is_made_of(plan, task)
    scratch = scratch_folder(job)  # stays where the run fails: its error may name a file there
    config = config_of(plan, job, scratch)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokenizer = pair_tokenizer(plan)
    float32 = {"dtype": "float32"}
    config.model_init_kwargs = float32 | (config.model_init_kwargs or {})
    config.teacher_model_init_kwargs = float32 | (config.teacher_model_init_kwargs or {})
    trainer = load_by_name(
        "models", f"{plan.student} and {plan.teacher}", TOPDTrainer, plan.student,
        teacher_model=plan.teacher, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list(task.prompts(job.steps * batch, job.seed)), peft_config=adapter_of(plan),
    )  # fmt: skip
    curve = Curve(plan, task, tokenizer, asks=job.held_out)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curve)
    trainer.train()
    asked = task.held_out() if job.held_out else task.tuning()
    right = {"sampled": task.right(trainer.model, tokenizer, asked, sampled=True)}
    if job.held_out:
        right["greedy"] = task.right(trainer.model, tokenizer, asked, sampled=False)
    shutil.rmtree(scratch, ignore_errors=True)
    log, seconds = trainer.state.log_history, time.perf_counter() - started
    record = {
        "version": 1,
        "settings": settings_of(plan, job), **made_of,
        "right": {how: [int(each) for each in answers] for how, answers in right.items()},
        "curve": curve.with_tokens(log), "metrics": metrics_of(log),
        "seconds_training": curve.seconds, "seconds": seconds,
    }  # fmt: skip
    write_json(record, job.file, indent=None)
    return record


def adapter_of(plan: StudyPlan) -> Any:
    """The adapter that runs train, or None. Raises `TOPDError` without peft, or for an unknown option."""
    if not plan.lora:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise TOPDError(f"lora needs peft: {install('peft')}") from error
    try:
        return LoraConfig(task_type="CAUSAL_LM", **plan.lora)
    except TypeError as error:
        raise TOPDError(f"lora: {error}") from error


KEPT_METRICS = (
    "loss", "token_loss/mean", "distance/q50", "false_alarm_share", "forks/per_rollout", "forks/threshold",
    "guidance/own_token_share", "guidance/grad_ratio",
)  # fmt: skip
"""Metrics recorded at each step."""


def metrics_of(log: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Values by metric and step."""
    found = {
        name: {str(entry["step"]): float(f"{entry[name]:.4g}") for entry in log if entry.get(name) is not None}
        for name in KEPT_METRICS
    }
    return {name: values for name, values in found.items() if values}


def scratch_folder(job: Job) -> Path:
    """An empty folder next to the job's record. The files of a killed run are deleted."""
    folder = job.file.with_name(f".{job.file.stem}{SCRATCH}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def pair_tokenizer(plan: StudyPlan) -> Any:
    """The tokenizer of both models. Raises `TOPDError` if one cannot be loaded or their tokenizers differ."""
    from topd.loading.models import model_to_train
    from topd.loading.tokenizers import check_tokenizers, tokenizer_of

    names = {"student": plan.student, "teacher": plan.teacher}
    student, teacher = (tokenizer_of(model_to_train(role, name)) for role, name in names.items())
    check_tokenizers(student, teacher)  # type: ignore[arg-type]  # of names they are never None
    return student


def config_of(plan: StudyPlan, job: Job, folder: Path) -> Any:
    """The run's `TOPDConfig`."""
    import torch

    from topd.training import TOPDConfig

    quiet: dict[str, Any] = {
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "bf16": False,
        "opd_loss": "trl", "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(),
        "lr_scheduler_type": "cosine", "warmup_steps": max(1, job.steps // 20),
    }  # fmt: skip
    return TOPDConfig(str(folder), **quiet | plan.options | job.options | {"max_steps": job.steps, "seed": job.seed})


def check_options(plan: StudyPlan) -> None:
    """Raise `TOPDError` for an option of an arm that no run could start with. No device is touched."""
    on_cpu = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None}
    for arm in plan.arms:
        for choice in arm.choices or ({},):
            try:
                config_of(plan, job_of(plan, arm, plan.seeds[0], choice | on_cpu, Path()), Path())
            except (TypeError, ValueError) as error:
                raise TOPDError(f"arm {arm.name}: {error}") from error
