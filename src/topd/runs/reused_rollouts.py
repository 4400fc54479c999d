"""Several optimizer updates per batch of rollouts (`num_iterations`, `steps_per_generation`), as in TRL's GRPOTrainer.

A batch of rollouts travels with all that was computed when it was sampled: the teacher's states, windows, plans and
weights. Updates after the first take it from the buffer. A checkpoint between two updates holds the buffer, so that a
resumed run equals the uninterrupted one.
"""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import Trainer
from trl.trainer.utils import (
    RepeatSampler,
    repeat_iterable_dataset,
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from topd.logs import get_logger

logger = get_logger(__name__)


class ReusedRollouts(Trainer):
    """Part of `TOPDTrainer`, before TRL's trainer: when rollouts are sampled, and how often they are used."""

    accelerator: Any
    args: Any
    model: Any
    shuffle_dataset: Any
    train_dataset: Any
    _buffered_inputs: Any
    _generate_and_score_completions: Any
    _step: int
    """Micro-batches so far. It starts at 0 again in a resumed run, so `_load_rng_state` sets it within the buffer."""

    @property
    def _micro_batches(self) -> int:
        """Micro-batches from one sampling of rollouts to the next."""
        return int(self.args.generation_steps * self.args.num_iterations)

    @property
    def _share_of_step(self) -> float:
        """The part of a batch of rollouts that one optimizer step takes."""
        return float(self.args.gradient_accumulation_steps / self.args.generation_steps)

    @property
    def _generations(self) -> int:
        """Batches of rollouts before the one that is in use or about to be sampled."""
        return int(self.state.global_step // self.args.updates_per_generation)

    # The three methods below are TRL's of `GRPOTrainer`, with one response per prompt.

    def get_train_dataloader(self) -> Any:
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            if self.shuffle_dataset:
                dataset = dataset.shuffle(seed=self.args.seed)
            dataset = repeat_iterable_dataset(dataset, 1, self._prompts_per_generation, self._micro_batches)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.generation_steps,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=1,
            batch_size=self._prompts_per_generation,
            repeat_count=self._micro_batches,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        pieces = self.args.generation_steps
        if self._step % self._micro_batches == 0 or self._buffered_inputs is None:
            batch: Any = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            batch = self._in_order(shuffle_sequence_dict(batch))
            parts: Any = split_tensor_dict(batch, pieces)  # with pixels of one image per row (plain OPD on images)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % pieces]

    def _in_order(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, its rows in the order in which micro-batches take them."""
        return batch

    @property
    def _prompts_per_generation(self) -> int:
        sizes = self.args.per_device_train_batch_size, self.args.generation_steps, self.accelerator.num_processes
        return math.prod(sizes)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        self._step, self._buffered_inputs = 0, None  # an earlier call of `train` may have ended between two updates
        return super()._init_training_state(*args, **kwargs)

    # Checkpoints between two updates of a batch

    def _buffer_file(self, folder: str) -> Path:
        """The buffer of this process in a checkpoint."""
        number = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(folder) / f"rollouts{number}.pt"

    def _buffer_sizes(self) -> list[int]:
        """Whether a buffer belongs to a run is decided by these."""
        args = self.args
        sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.generation_steps
        return [*sizes, args.num_iterations, args.world_size]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._step % self._micro_batches and self._buffered_inputs is not None:
            content = {"sizes": self._buffer_sizes(), "batches": self._buffered_inputs}
            torch.save(content, self._buffer_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps % self._micro_batches
        file = self._buffer_file(checkpoint)
        if not self._step or not file.is_file():
            return
        content = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        if content["sizes"] == self._buffer_sizes():
            self._buffered_inputs = content["batches"]
        else:
            logger.warning("Batch sizes differ from those of the checkpoint, so new rollouts are sampled.")
