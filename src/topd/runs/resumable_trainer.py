"""A trainer whose runs can be killed at any time: only the work since the last checkpoint is lost.

A run resumed on the same machine equals the uninterrupted one, bit for bit on CPU. This class adds what transformers
and TRL lack for that: checkpoints are written aside and renamed; data order is restored, also in later epochs; a
finished run takes no further step; records of repeated steps are cut; Ctrl-C and SIGTERM save a checkpoint; a full disk
ends in a message.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from topd.errors import ResumeError, TOPDError
from topd.logs import get_logger
from topd.runs.checkpoints import (
    UNFINISHED,
    changed_file,
    checkpoint_to_resume,
    damage,
    put_in_place,
    saving,
    saving_error,
)
from topd.runs.files import write_json
from topd.runs.guard import DISK_FULL, output_may_close
from topd.runs.interrupts import StopWhenAsked, run_interrupted
from topd.runs.non_finite import first_non_finite, non_finite_weights
from topd.runs.records import AUDIT_FILE, EVAL_FILE, cut_records
from topd.runs.sole_writer import sole_writer

logger = get_logger(__name__)
# TRL 1.16 uses names that transformers 5.2x has replaced; a user cannot change that.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)

OWN_STATE = "topd_state.json"
"""In a checkpoint: the state of the method itself."""


class ResumableTrainer(Trainer):
    """See the module. Put it before a trainer of TRL or transformers, as in `TOPDTrainer`.

    Raises:
        RunInterrupted: from `train`, after Ctrl-C or SIGTERM and a saved checkpoint.
        SavingError: the disk is full or broken.
        ResumeError: there is no whole checkpoint to resume from, or it would run code.
        NonFiniteError: a weight is NaN or infinite where a checkpoint or the model is to be saved.
        TOPDError: another process trains into the output folder, or all weights are frozen.
    """

    model: Any

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
        """As in transformers; `resume_from_checkpoint=True` takes the newest complete checkpoint."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise TOPDError(
                "Nothing would be trained: all weights of the student are frozen. Set requires_grad; load an adapter "
                "with PeftModel.from_pretrained(..., is_trainable=True)."
            )
        if self.args.max_steps <= 0 and self.args.num_train_epochs <= 0:
            raise TOPDError(
                f"Nothing would be trained: num_train_epochs is {self.args.num_train_epochs}. Set it, or max_steps."
            )
        with self._locked_folder(), output_may_close(continues=True), ExitStack() as stack:
            checkpoint = self._checkpoint_of(resume_from_checkpoint) if resume_from_checkpoint else None
            if self.args.save_strategy != "no":  # else there is nothing to resume from: signals keep their defaults
                stack.enter_context(self._interrupt.listening())
            output = self._trained(checkpoint, *args, **kwargs)
        if self._interrupt.stopped:
            raise run_interrupted(self.state, self._folder, self._interrupt.received)
        return output

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Lock the output folder against other runs."""
        with ExitStack() as stack:
            self._on_main_process(lambda: stack.enter_context(sole_writer(self._folder)))
            yield

    def _on_main_process(self, act: Callable[[], Any]) -> Any:
        """Run `act` on the main process; return its result, or raise its `TOPDError`, on all processes."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [act()]
            except TOPDError as error:
                found = [error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], TOPDError):
            raise found[0]
        return found[0]

    def _checkpoint_of(self, wanted: Any) -> Path:
        found = self._on_main_process(lambda: checkpoint_to_resume(wanted, self._folder))
        checkpoint: Path = found[0]
        for line in found[1]:
            logger.warning(f"{line}; resuming from {checkpoint}.")
        return checkpoint

    def _trained(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> Any:
        """Train; explain errors, and refuse final weights that are not finite."""
        try:
            output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except pickle.UnpicklingError as error:
            broken = damage(checkpoint, thorough=True) if checkpoint is not None else None
            if broken is not None:
                raise ResumeError(
                    f"{checkpoint} is not a complete checkpoint: {broken}. Resume from another."
                ) from error
            raise ResumeError(
                f"{checkpoint} contains a file that would run code when loaded, so it was not loaded. Resume only from "
                "checkpoints of your own runs; to start from other weights, pass them as the student."
            ) from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise saving_error("A file of the run", self._folder, error) from error
        self._refuse_non_finite("the trained model")
        return output

    def _refuse_non_finite(self, what: str, everywhere: bool = True) -> None:
        """Raise `NonFiniteError` if a trained weight is not finite; `everywhere`: on any process, then on all."""
        name = first_non_finite(self.accelerator.unwrap_model(self.model))
        if self._on_any_process(name is not None) if everywhere else name is not None:
            raise non_finite_weights(name or "of another process", self.state.global_step, what, self._folder)

    def _load_best_model(self) -> None:
        """As in transformers, but a damaged checkpoint is not loaded."""
        best = Path(str(self.state.best_model_checkpoint))
        broken = self._on_main_process(lambda: changed_file(best, thorough=True))
        if broken is None:
            super()._load_best_model()
        else:
            logger.warning(f"{best}, the best checkpoint, is damaged: {broken}. The model stays that of the last step.")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in transformers, but weights that are tied to others are not missing: a checkpoint has them once."""
        model: Any = self.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stored = {id(parameters[name]) for name in parameters if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(parameters.get(name)) not in stored]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but refuses weights that are not finite, and writes whole weights under FSDP2 too.

        transformers writes none there with sharded state dicts, accelerate's default. With FSDP2 all processes must
        call it; without, only those that save.
        """
        if _internal_call:  # a checkpoint, which keeps its form
            super().save_model(output_dir, _internal_call)
            return
        self._refuse_non_finite("the model", everywhere=False)
        if not self.is_fsdp_enabled:
            super().save_model(output_dir)
            return
        plugin: Any = self.accelerator.state.fsdp_plugin
        form = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            plugin.set_state_dict_type(form)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else the checkpoint does not have its final name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, checkpoint = run_folder / UNFINISHED, run_folder / name
        self._refuse_non_finite(name)
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
                    write_json(self._own_state(), aside / name / OWN_STATE)
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
        """The method's state for a checkpoint, as JSON."""
        return {}

    def _restore_own_state(self, state: dict[str, Any]) -> None:
        """Restore the method's state."""

    # Resuming

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps: Any, steps_per_epoch: Any, num_epochs: Any, checkpoint: Any, trial: Any
    ) -> Any:
        epochs_trained, steps = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)  # else transformers keeps the earlier run's save_steps
        sampler = getattr(self, "_train_sampler", None)
        if isinstance(sampler, RepeatSampler) and sampler.shuffle:  # one random stream shuffles all epochs
            for _ in range(epochs_trained):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        if checkpoint is not None and (Path(checkpoint) / OWN_STATE).is_file():
            self._restore_own_state(json.loads((Path(checkpoint) / OWN_STATE).read_text()))
        if self.accelerator.is_main_process:
            for name in (AUDIT_FILE, EVAL_FILE):
                cut_records(self._folder / name, self.state.global_step)
        return epochs_trained, steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run: transformers would take one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
