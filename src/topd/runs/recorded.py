"""A trainer that records what its run is made of, compares it on resuming, and applies what was changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from topd.errors import ResumeError
from topd.runs import provenance
from topd.runs.checkpoints import newest_whole, saving
from topd.runs.model_card import complete_card
from topd.runs.output_folder import AUTO, refuse_second_run
from topd.runs.resumed_run import compared

logger = get_logger(__name__)


@dataclass(frozen=True)
class Started:
    """How a run was started: from the command line, or with `python` by a program of its own.

    Attributes:
        options: every option, as `--config` takes it.
        changed: names of those that differ from their defaults.
        command: as it was typed.
    """

    options: Mapping[str, Any]
    changed: list[str]
    command: str


class RecordedTrainer(Trainer):
    """See the module. To be put before the other classes of a trainer, as in `TOPDTrainer`.

    Raises:
        ResumeError: from `train`: the folder holds the checkpoints of another run, or the checkpoint to resume from
            belongs to another model.
    """

    started: Started | None = None
    """Set by the command line; otherwise it is made from `args`."""
    _names: Mapping[str, str | None] = {}
    _begun: dict[str, Any] | None = None
    _changes: tuple[str, ...] = ()
    _on_any_process: Any
    """Whether something is so on any process: `SurvivingTrainer`'s."""
    _alone: Any
    """Holds the output folder: likewise."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `resume_from_checkpoint="auto"` resumes where there is a whole checkpoint."""
        folder = Path(str(self.args.output_dir))
        resume = resume_from_checkpoint or None
        if resume == AUTO:
            resume = True if newest_whole(folder)[0] else None
        with self._alone():
            if resume is None:
                refuse_second_run(folder)
                self._write_run(None)
            else:
                self._compare_with(folder if resume is True else Path(os.fspath(resume)).absolute().parent)
            return super().train(resume, *args, **kwargs)

    # The record

    def _models(self) -> dict[str, Any]:
        """Student and teachers by their name in the record."""
        return {"student": self.model, "teacher": getattr(self, "teacher_model", None)}

    def _run_record(self) -> tuple[Started, dict[str, Any]]:
        """How the run was started, and what it is made of; of the models as they were before the first step."""
        if self._begun is None:
            tokenizer: Any = getattr(self, "_tokenizer", self.processing_class)
            unwrapped = {role: self.accelerator.unwrap_model(m) for role, m in self._models().items() if m is not None}
            models = {role: provenance.model_record(m, self._names.get(role)) for role, m in unwrapped.items()}
            self._begun = {
                "versions": provenance.versions(),
                "precision": {role: model["dtype"] for role, model in models.items()} | {"computed": self._computed()},
                "device": torch.cuda.get_device_name() if self.args.device.type == "cuda" else self.args.device.type,
                "processes": self.args.world_size,
                "tokenizer": provenance.tokenizer_digest(getattr(tokenizer, "tokenizer", tokenizer)),
                **models,
                "data": provenance.data_record(self._prompts()),
            }
        return self.started or self._started_here(), self._begun

    def _prompts(self) -> Any:
        """The dataset as it was given."""
        return self.train_dataset

    def _computed(self) -> str:
        return "bfloat16 autocast" if self.args.bf16 else "float16 autocast" if self.args.fp16 else "as stored"

    def _started_here(self) -> Started:
        names = {"model_name_or_path": self._names.get("student")}
        if self._names.get("teacher"):
            names["teacher_model_name_or_path"] = self._names["teacher"]
        options = {name: value for name, value in names.items() if value} | {
            name: value for name, value in provenance.options_of(self.args).items() if not names.get(name)
        }
        changed = [*names, *provenance.changed_options(options, type(self.args))]
        return Started(options, changed, provenance.command_line(["python", *sys.argv]))

    def _write_run(self, checkpoint: str | None) -> None:
        """Write `run.yaml`, with what changed if the run is resumed from `checkpoint`."""
        if not self.accelerator.is_main_process:
            return
        started, made_of = self._run_record()
        folder = Path(str(self.args.output_dir))
        earlier = provenance.read_run(folder)[1].get("resumed") or [] if checkpoint else []
        if checkpoint:
            earlier = [*earlier, {"from": checkpoint, "time": provenance.now(), "changed": list(self._changes)}]
        with saving(str(folder / provenance.RUN_FILE), folder):
            folder.mkdir(parents=True, exist_ok=True)
            record = {"command": started.command, "time": provenance.now(), **made_of, "resumed": earlier}
            provenance.write_run(folder, started.options, started.changed, record)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, with the student's name, and with the run's record as a section of its own."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            started, made_of = self._run_record()
            complete_card(Path(str(self.args.output_dir)), started.options, started.changed, made_of)

    # Resuming

    def _compare_with(self, folder: Path) -> None:
        """Report what differs from the run whose checkpoint is resumed; refuse what cannot be meant."""
        refused: list[str] = []
        if self.accelerator.is_main_process:
            before, started, made_of = provenance.read_run(folder), *self._run_record()
            if before[1]:
                changes, refused = compared(before, (started.options, made_of))
                self._changes = tuple(changes)
            else:
                logger.warning(f"{folder} has no {provenance.RUN_FILE}: whether its options were others is not known.")
            if self._changes and not refused:
                lines = "".join(f"\n  {line}" for line in self._changes)
                logger.warning(f"Resuming with changes, which hold from here on:{lines}")
        if self._on_any_process(bool(refused)):
            raise ResumeError(
                f"The checkpoint belongs to another run, by {folder / provenance.RUN_FILE}: {'; '.join(refused)}. "
                "Resume with the models of that run; or start a new run in another --output_dir, with the checkpoint "
                "as its student."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their states, and keep what this run sets: learning rate, weight decay, betas and the schedule."""
        if checkpoint is None or self.optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        given = [dict(group, params=None) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_deepspeed_enabled:  # it has loaded them itself, with the model
            if self._changes:
                logger.warning("DeepSpeed keeps the checkpoint's learning rate, weight decay and betas.")
        else:
            apply_given(self.optimizer, getattr(self.lr_scheduler, "scheduler", self.lr_scheduler), given)
        self._write_run(Path(checkpoint).name)


def apply_given(optimizer: Any, scheduler: Any, given: list[dict[str, Any]]) -> None:
    """Put the settings of an optimizer that was just made over those that a checkpoint restored.

    The learning rate follows from the schedule at the restored step. Where nothing was changed, nothing changes.

    Args:
        scheduler: of this optimizer, with the checkpoint's step.
        given: the optimizer's groups before the checkpoint was loaded.
    """
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        before = group.get("initial_lr")
        group.update({name: value for name, value in settings.items() if name not in ("params", "lr")})
        if not isinstance(scheduler, LambdaLR) and before:  # without a formula: in proportion
            group["lr"] = group["lr"] * (group["initial_lr"] / before)
    rates = [group["lr"] for group in optimizer.param_groups]
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    elif hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = rates
