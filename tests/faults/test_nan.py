"""A NaN in the student: the run stops before the optimizer moves, and names the last whole checkpoint."""

import pytest
import torch
from tiny import tiny_model, tiny_trainer
from transformers import TrainerCallback

from topd.errors import NonFiniteError
from topd.training.checkpoints import damage

SAVES = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 6}


class Spoil(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.data[:, 0] = torch.nan


def test_a_nan_stops_the_run_and_the_checkpoint_before_it_goes_on(tmp_path, fault):
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [Spoil()]}, **SAVES)
    with pytest.raises(NonFiniteError, match=r"step 3.*optimizer has not moved.*last whole checkpoint is .*point-2\b"):
        trainer.train()
    assert damage(tmp_path / "checkpoint-2") is None
    healthy = tiny_trainer(tmp_path, student=tiny_model(5), **SAVES)
    healthy.train(resume_from_checkpoint=True)
    assert all(bool(parameter.isfinite().all()) for parameter in healthy.model.parameters())
    assert healthy.state.global_step == 3
    fault("a NaN in a weight", "stopped before the optimizer moved, names checkpoint-2", "the step in flight")


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [Spoil()]}, **SAVES | {"save_strategy": "no"})
    with pytest.raises(NonFiniteError, match=r"no checkpoint was saved yet.*Start again"):
        trainer.train()
