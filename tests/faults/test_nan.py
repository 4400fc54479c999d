"""A NaN in the student: the run stops before the optimizer moves, and names the last complete checkpoint."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_trainer
from transformers import TrainerCallback

from topd.cli.main import main
from topd.embedded.pair import resolve_model
from topd.errors import NonFiniteError
from topd.runs.checkpoints import damage
from topd.runs.non_finite import first_non_finite

SAVES = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 6}


class Spoil(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.data[:, 0] = torch.nan


def test_a_nan_stops_the_run_and_the_checkpoint_before_it_goes_on(tmp_path, fault):
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [Spoil()]}, **SAVES)
    with pytest.raises(NonFiniteError, match=r"step 3.*optimizer has not moved.*last complete checkpoint is .*-2\b"):
        trainer.train()
    assert damage(tmp_path / "checkpoint-2") is None
    healthy = tiny_trainer(tmp_path, student=tiny_model(5), **SAVES)
    healthy.train(resume_from_checkpoint=True)
    assert all(bool(parameter.isfinite().all()) for parameter in healthy.model.parameters())
    assert healthy.state.global_step == 3
    fault("a NaN in a weight", "stopped before the optimizer moved, names checkpoint-2", "the step in flight")


class SpoilWeights(TrainerCallback):
    """As a step too large: the weights are not finite, and no loss has seen them yet."""

    def __init__(self, step, value=torch.inf):
        self.step, self.value = step, value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            model.lm_head.weight.data[0, 0] = self.value


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=["inf", "nan"])
def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path, fault, value):
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [SpoilWeights(2, value)]}, **SAVES)
    says = r"weight is not finite after step 2, so checkpoint-2 was not saved. Resume from .*checkpoint-1, .*lower"
    with pytest.raises(NonFiniteError, match=says):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    fault(f"a step that makes a weight {value}", "stopped; not saved, names checkpoint-1", "the steps since")


def test_the_last_step_too(tmp_path, fault):
    """Nothing looks at the weights after it."""
    options = SAVES | {"save_strategy": "no"}
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [SpoilWeights(3)]}, **options)
    with pytest.raises(NonFiniteError, match=r"not finite after step 3, so the trained model was not saved"):
        trainer.train()
    with pytest.raises(NonFiniteError, match=r"so the model was not saved"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    fault("the last step makes a weight infinite", "a message; no model is saved", "the steps since")


def test_large_weights_are_finite():
    model = torch.nn.Linear(4, 4).half()
    model.weight.data.fill_(60_000)  # their sum overflows
    assert first_non_finite(model) is None
    model.weight.data[1, 2] = -torch.inf
    assert first_non_finite(model) == "weight"
    assert first_non_finite(model.requires_grad_(False)) is None  # nothing trained it


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [Spoil()]}, **SAVES | {"save_strategy": "no"})
    with pytest.raises(NonFiniteError, match=r"no checkpoint was saved yet.*Start again"):
        trainer.train()


OF_THE_MODEL = {
    "eval": ["--model", "MODEL", "--benchmark", "embedded", "--limit", "2", "--samples", "1"],
    "generate": ["--teacher", "MODEL", "--data", "embedded", "--limit", "2", "--temperature", "0"],
    "probe": ["--student", "embedded:student-standard", "--teacher", "MODEL", "--rollouts", "2"],
    "correct": ["--student", "embedded:student-standard", "--teacher", "MODEL", "--rollouts", "2"],
}


@pytest.mark.parametrize("command", OF_THE_MODEL)
def test_a_model_that_computes_nan_has_no_accuracy_and_no_solutions(tmp_path, capsys, command, fault):
    broken = tmp_path / "model"
    shutil.copytree(resolve_model("embedded:teacher"), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = [str(broken) if word == "MODEL" else word for word in OF_THE_MODEL[command]]
    out = tmp_path / ("out.jsonl" if command == "generate" else "out")
    assert main([command, *words, "--max-new-tokens", "8", "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "are NaN" in said
    assert "--dtype float32 or bfloat16" in said
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
    fault(f"topd {command}: a model that computes NaN", "a message; nothing is counted or kept")
