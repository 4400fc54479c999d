"""A trainer whose runs can be killed at any moment: what is lost is the work since the last checkpoint.

Resumed on the same machine, a run equals the uninterrupted one, bit for bit on CPU. What transformers and TRL leave
open for that, and is done here: a checkpoint is written aside and renamed; the order of the data is that of the epoch,
also in later epochs; a finished run takes no further step; records of steps that are done again are cut; Ctrl-C and
SIGTERM save a checkpoint; a full disk ends in a message.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from topd.errors import ResumeError
from topd.training.audit import AUDIT_FILE, cut_records
from topd.training.checkpoints import UNFINISHED, checkpoint_to_resume, put_in_place, saving, saving_error
from topd.training.interrupts import StopWhenAsked, run_interrupted

logger = get_logger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OWN_STATE = "topd_state.json"
"""In a checkpoint: what the method itself has learned about the run."""


class SurvivingTrainer(Trainer):
    """See the module. To be put before a trainer of TRL or transformers, as in `TOPDTrainer`.

    Raises:
        RunInterrupted: from `train`, after Ctrl-C or SIGTERM and a saved checkpoint.
        SavingError: the disk is full or broken.
        ResumeError: there is no whole checkpoint to resume from, or it would run code.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._aside: Path | None = None
        super().__init__(*args, **kwargs)
        self._interrupt = StopWhenAsked(self._on_any_process)
        self.add_callback(self._interrupt)

    def _on_any_process(self, here: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor([float(here)], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `resume_from_checkpoint=True` takes the newest whole checkpoint."""
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint, passed_over = checkpoint_to_resume(resume_from_checkpoint, self._folder)
            for line in passed_over:
                logger.warning(f"{line}; resuming from {checkpoint}.")
        saves = self.args.save_strategy != "no"  # else there is nothing to go on from: signals do what they always do
        with self._interrupt.listening() if saves else nullcontext():
            try:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except pickle.UnpicklingError as error:
                raise ResumeError(
                    f"{checkpoint} holds a file that would run code when it is loaded, so it was not. Resume only from "
                    "checkpoints of your own runs; to start from another's weights, name them as the student."
                ) from error
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                raise saving_error("A file of the run", self._folder, error) from error
        if self._interrupt.stopped:
            raise run_interrupted(self.state, self._folder, self._interrupt.received)
        return output

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it has not its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, checkpoint = run_folder / UNFINISHED, run_folder / name
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            with saving(f"{checkpoint}", run_folder):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(aside / name):
                    self.state.best_model_checkpoint = str(checkpoint)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
                    (aside / name / OWN_STATE).write_text(json.dumps(self._own_state()) + "\n")
                    put_in_place(aside / name, checkpoint)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                str(run_folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the method; JSON."""
        return {}

    def _restore_own_state(self, state: dict[str, Any]) -> None:
        """Take it up again."""

    # Resuming

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps: Any, steps_per_epoch: Any, num_epochs: Any, checkpoint: Any, trial: Any
    ) -> Any:
        epochs_trained, steps = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)  # transformers would keep the earlier run's save_steps
        sampler = getattr(self, "_train_sampler", None)
        if (
            isinstance(sampler, RepeatSampler) and sampler.shuffle
        ):  # it shuffles anew each epoch, from one stream of random numbers
            for _ in range(epochs_trained):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        if checkpoint is not None and (Path(checkpoint) / OWN_STATE).is_file():
            self._restore_own_state(json.loads((Path(checkpoint) / OWN_STATE).read_text()))
        if self.accelerator.is_main_process:
            cut_records(self._folder / AUDIT_FILE, self.state.global_step)
        return epochs_trained, steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run: transformers would do one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
