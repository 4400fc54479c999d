"""A trainer that records what its run is made of, compares it on resuming, and completes the model card."""

import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR

from topd.errors import ResumeError
from topd.logs import get_logger
from topd.runs import provenance
from topd.runs.checkpoints import AUTO, newest_whole, refuse_second_run, saving
from topd.runs.console import give_header, run_in_words
from topd.runs.provenance import compared
from topd.runs.resumable_trainer import ResumableTrainer

logger = get_logger(__name__)


@dataclass(frozen=True)
class StartRecord:
    """How a run was started, from the command line or by the user's own program."""

    options: Mapping[str, Any]  # every one, as `--config` takes it
    changed: list[str]  # names of those that differ from their defaults
    command: str  # as typed


class RecordedTrainer(ResumableTrainer):
    """Records the run. Put it before the other base classes of a trainer, as in `TOPDTrainer`.

    `train` raises `ResumeError` if the folder holds the checkpoints of another run, or the checkpoint to resume from
    belongs to another model.
    """

    start_record: StartRecord | None = None  # set by the command line; otherwise derived from `args`
    _names: Mapping[str, str | None] = {}
    _begun: dict[str, Any] | None = None
    _changes: tuple[str, ...] = ()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `resume_from_checkpoint="auto"` resumes if there is a whole checkpoint."""
        resume = resume_from_checkpoint or None
        if resume == AUTO:
            resume = True if newest_whole(self._folder)[0] else None
        with self._locked_folder():
            if resume is None:
                refuse_second_run(self._folder)
                self._write_run(None)
            else:
                self._compare_with(self._folder if resume is True else Path(os.fspath(resume)).absolute().parent)
            started, made_of = self._run_record()
            give_header(self, run_in_words(started.options, made_of, self.args))
            return super().train(resume, *args, **kwargs)

    # The record

    def _models(self) -> dict[str, Any]:
        """Student and teachers by their names in the record."""
        return {"student": self.model, "teacher": getattr(self, "teacher_model", None)}

    def _run_record(self) -> tuple[StartRecord, dict[str, Any]]:
        """How the run was started, and what it is made of; models as they were before the first step."""
        if self._begun is None:
            tokenizer: Any = getattr(self, "_tokenizer", self.processing_class)
            tokens = [(i, token) for token, i in getattr(tokenizer, "tokenizer", tokenizer).get_vocab().items()]
            unwrapped = {role: self.accelerator.unwrap_model(m) for role, m in self._models().items() if m is not None}
            models = {role: provenance.model_record(m, self._names.get(role)) for role, m in unwrapped.items()}
            computed = "bfloat16 autocast" if self.args.bf16 else "float16 autocast" if self.args.fp16 else "as stored"
            self._begun = {
                "versions": provenance.versions(),
                "precision": {role: model["dtype"] for role, model in models.items()} | {"computed": computed},
                "device": torch.cuda.get_device_name() if self.args.device.type == "cuda" else self.args.device.type,
                "processes": self.args.world_size,
                "tokenizer": provenance.digest(f"{i} {token}" for i, token in sorted(tokens)),
                **models,
                "data": provenance.data_record(self._prompts()),
            }
        return self.start_record or self._start_record_from_args(), self._begun

    def _prompts(self) -> Any:
        """The dataset as given by the user."""
        return self.train_dataset

    def _start_record_from_args(self) -> StartRecord:
        names = {"model_name_or_path": self._names.get("student")}
        if self._names.get("teacher"):
            names["teacher_model_name_or_path"] = self._names["teacher"]
        options = {name: value for name, value in names.items() if value} | {
            name: value for name, value in provenance.options_of(self.args).items() if not names.get(name)
        }
        changed = [*names, *provenance.changed_options(options, type(self.args))]
        return StartRecord(options, changed, provenance.command_line(["python", *sys.argv]))

    def _write_run(self, checkpoint: str | None) -> None:
        """Write `run.yaml`; if the run is resumed from `checkpoint`, with what changed."""
        if not self.accelerator.is_main_process:
            return
        started, made_of = self._run_record()
        folder = self._folder
        earlier = provenance.read_run(folder)[1].get("resumed") or [] if checkpoint else []
        if checkpoint:
            earlier = [*earlier, {"from": checkpoint, "time": provenance.now(), "changed": list(self._changes)}]
        with saving(str(folder / provenance.RUN_FILE), folder):
            folder.mkdir(parents=True, exist_ok=True)
            record = {"command": started.command, "time": provenance.now(), **made_of, "resumed": earlier}
            provenance.write_run(folder, started.options, started.changed, record)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, with the student's name and a section with the run's record."""
        super().create_model_card(*args, **kwargs)
        card = self._folder / "README.md"
        if self.is_world_process_zero() and card.is_file():
            started, made_of = self._run_record()
            student = made_of["student"]["name"].replace("`", "")
            before, framework, after = card.read_text(encoding="utf-8").partition("### Framework versions")
            rows = run_in_words(started.options, made_of, self.args)
            rows["data"] += f", digest {made_of['data']['digest']}"
            rows["versions"] = ", ".join(f"{name} {version}" for name, version in made_of["versions"].items())
            given = {name: value for name, value in started.options.items() if name in started.changed}
            section = run_section(rows, given)
            before = before.replace("[None](https://huggingface.co/None)", f"`{student}`")
            card.write_text(f"{before}{section}\n{framework}{after}", encoding="utf-8")

    # Resuming

    def _compare_with(self, folder: Path) -> None:
        """Report what differs from the run whose checkpoint is resumed; refuse another model's checkpoint."""
        refused: list[str] = []
        if self.accelerator.is_main_process:
            before, started, made_of = provenance.read_run(folder), *self._run_record()
            if before[1]:
                changes, refused = compared(before, (started.options, made_of))
                self._changes = tuple(changes)
            else:
                logger.warning(f"{folder} has no {provenance.RUN_FILE}: its options cannot be compared.")
            if self._changes and not refused:
                lines = "".join(f"\n  {line}" for line in self._changes)
                logger.warning(f"Resuming with changed options:{lines}")
        if self._on_any_process(bool(refused)):
            raise ResumeError(
                f"The checkpoint belongs to another run, according to {folder / provenance.RUN_FILE}: "
                f"{'; '.join(refused)}. Resume with the models of that run; or start a new run in another "
                "--output_dir, with the checkpoint as its student."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both states, but keep this run's learning rate, weight decay, betas and schedule."""
        if checkpoint is None or self.optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        given = [dict(group, params=None) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_deepspeed_enabled:  # it loads the states itself, with the model
            if self._changes:
                logger.warning("DeepSpeed keeps the checkpoint's learning rate, weight decay and betas.")
        else:
            apply_given(self.optimizer, getattr(self.lr_scheduler, "scheduler", self.lr_scheduler), given)
        self._write_run(Path(checkpoint).name)


def apply_given(optimizer: Any, scheduler: Any, given: list[dict[str, Any]]) -> None:
    """Restore an optimizer's own settings, `given`, after a checkpoint has replaced its groups.

    The learning rate follows from the scheduler, which is at the checkpoint's step.
    """
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        before = group.get("initial_lr")
        group.update({name: value for name, value in settings.items() if name not in ("params", "lr")})
        if not isinstance(scheduler, LambdaLR) and before:  # a schedule without a formula: scale in proportion
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


PAPER = {
    "title": "Bridging Reasoning Trajectories in On-Policy Distillation via Near-Future Guidance",
    "id": "2606.00305",
    "citation": textwrap.dedent("""\
        @article{jiang2026bridging,
            title  = {{Bridging Reasoning Trajectories in On-Policy Distillation via Near-Future Guidance}},
            author = {Yuxuan Jiang and Francis Ferraro},
            year   = 2026,
            eprint = {arXiv:2606.00305},
        }"""),
}
"""The method's paper, in the form that TRL's card cites it."""


def run_section(rows: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """The run as Markdown: what it was made of, and the options that were set."""
    cells = {name: " ".join(value.split()).replace("|", "\\|") for name, value in rows.items()}
    table = "\n".join(f"| {name} | {cell} |" for name, cell in cells.items())
    dumped = yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True, width=120)
    return (
        f"## The run\n\n| | |\n|---|---|\n{table}\n\nOptions (all of them are in `run.yaml`):\n\n```yaml\n{dumped}```\n"
    )
