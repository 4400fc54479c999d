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
from transformers import Trainer

from topd.errors import ResumeError
from topd.logs import get_logger
from topd.runs import provenance
from topd.runs.checkpoints import AUTO, newest_whole, refuse_second_run, saving
from topd.runs.console import data_in_words, give_header, header_lines, models_in
from topd.runs.provenance import compared

logger = get_logger(__name__)


@dataclass(frozen=True)
class StartRecord:
    """How a run was started, from the command line or by the user's own program.

    Attributes:
        options: every option, as `--config` takes it.
        changed: names of the options that differ from their defaults.
        command: as typed.
    """

    options: Mapping[str, Any]
    changed: list[str]
    command: str


class RecordedTrainer(Trainer):
    """Records the run. Put it before the other base classes of a trainer, as in `TOPDTrainer`.

    Raises:
        ResumeError: from `train`: the folder holds the checkpoints of another run, or the checkpoint to resume from
            belongs to another model.
    """

    start_record: StartRecord | None = None
    """Set by the command line; otherwise derived from `args`."""
    _names: Mapping[str, str | None] = {}
    _begun: dict[str, Any] | None = None
    _changes: tuple[str, ...] = ()
    _on_any_process: Any
    """Whether a value is true on any process: see `ResumableTrainer`."""
    _locked_folder: Any
    """Locks the output folder: see `ResumableTrainer`."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `resume_from_checkpoint="auto"` resumes if there is a whole checkpoint."""
        folder = Path(str(self.args.output_dir))
        resume = resume_from_checkpoint or None
        if resume == AUTO:
            resume = True if newest_whole(folder)[0] else None
        with self._locked_folder():
            if resume is None:
                refuse_second_run(folder)
                self._write_run(None)
            else:
                self._compare_with(folder if resume is True else Path(os.fspath(resume)).absolute().parent)
            give_header(self, self._header)
            return super().train(resume, *args, **kwargs)

    def _header(self) -> list[str]:
        started, made_of = self._run_record()
        return header_lines(started.options, made_of, self.args)

    # The record

    def _models(self) -> dict[str, Any]:
        """Student and teachers by their names in the record."""
        return {"student": self.model, "teacher": getattr(self, "teacher_model", None)}

    def _run_record(self) -> tuple[StartRecord, dict[str, Any]]:
        """How the run was started, and what it is made of; models as they were before the first step."""
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
        return self.start_record or self._start_record_from_args(), self._begun

    def _prompts(self) -> Any:
        """The dataset as given by the user."""
        return self.train_dataset

    def _computed(self) -> str:
        return "bfloat16 autocast" if self.args.bf16 else "float16 autocast" if self.args.fp16 else "as stored"

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
        folder = Path(str(self.args.output_dir))
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
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            started, made_of = self._run_record()
            text = card.read_text(encoding="utf-8").replace(_NOBODY, f"`{_name(made_of['student'])}`")
            before, framework, after = text.partition("### Framework versions")
            section = run_section(started.options, started.changed, made_of)
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

_NOBODY = "[None](https://huggingface.co/None)"


def run_section(options: Mapping[str, Any], changed: list[str], provenance: Mapping[str, Any]) -> str:
    """The run as Markdown: models, data, precision, versions, and the options that were set."""
    models = models_in(provenance)
    rows = {role: f"`{_name(model)}`, {model['parameters']:,} parameters" for role, model in models.items()}
    rows["data"] = f"{data_in_words(options, provenance)}, digest `{provenance['data']['digest']}`"
    rows["precision"] = ", ".join(f"{name}: {value}" for name, value in provenance["precision"].items())
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    given = {name: options[name] for name in options if name in set(changed)}
    dumped = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=120)
    return (
        f"## The run\n\n| | |\n|---|---|\n{table}\n\nOptions (all of them are in `run.yaml`):\n\n```yaml\n{dumped}```\n"
    )


def _name(model: Mapping[str, Any]) -> str:
    revision = f" at {model['revision']}" if model["revision"] else ""
    return f"{model['name']}{revision}".replace("`", "")


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
