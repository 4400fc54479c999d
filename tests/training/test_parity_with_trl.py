"""With the near-future part off, TOPD's trainer is TRL's DistillationTrainer, bit for bit."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_trainer
from trl import DistillationTrainer

from topd.training import TOPDTrainer


def five_steps(out: Path, trainer_type: type, **options):
    trainer = tiny_trainer(out, trainer_type, max_steps=5, gradient_accumulation_steps=2, **options)
    gradients = []
    step = trainer.create_optimizer().step

    def recording_step(*args, **kwargs):
        gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
        return step(*args, **kwargs)

    trainer.optimizer.step = recording_step
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, gradients, [p.detach() for p in trainer.model.parameters()]


@cache
def five_steps_of_trl(**options):
    with tempfile.TemporaryDirectory() as folder:
        return five_steps(Path(folder), DistillationTrainer, **options)


@pytest.mark.parametrize(
    "off", [{"method": "opd"}, {"method": "topd", "guidance_weight": 0.0}, {"method": "opd", "bf16": True}], ids=str
)
def test_losses_gradients_and_weights_after_five_steps_are_those_of_trl(tmp_path, off):
    theirs = five_steps_of_trl(bf16=off.get("bf16", False))
    ours = five_steps(tmp_path, TOPDTrainer, opd_loss="trl", **off)
    assert len(ours[0]) == 5
    assert ours[0] == theirs[0]
    assert len(ours[1]) == len(theirs[1]) == 5
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert len(mine) > 10
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


def test_with_guidance_on_the_weights_differ_from_trl(tmp_path):
    """The comparison above can fail."""
    theirs = five_steps_of_trl(bf16=False)
    ours = five_steps(tmp_path, TOPDTrainer, method="topd")
    assert not all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


def test_the_opd_part_of_a_topd_step_is_trl_s_loss(tmp_path):
    """Our tiled token loss beside TRL's, on the same rollouts: weights 1 and lambda tiny."""
    ours = tiny_trainer(tmp_path, student=tiny_model(0), guidance_weight=1e-12)
    inputs = ours._prepare_inputs([ours.train_dataset[i] for i in range(4)])
    loss = ours.compute_loss(ours.model, dict(inputs))
    plain = {name: value for name, value in inputs.items() if name != "topd_step"}
    reference = ours.compute_loss(ours.model, plain)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_plain_opd_in_one_pass_is_the_same_to_rounding(tmp_path, beta):
    theirs = five_steps_of_trl(bf16=False) if beta == 1.0 else five_steps_of_trl(beta=beta)
    ours = five_steps(tmp_path, TOPDTrainer, method="opd", opd_loss="one_pass", beta=beta)
    assert [float(loss) for loss in ours[0]] == pytest.approx([float(loss) for loss in theirs[0]], rel=1e-3)
    for mine, other in zip(ours[1][0], theirs[1][0], strict=True):  # gradients of the first step
        assert (
            mine - other
        ).norm() <= 1e-4 * other.norm()  # positions begin at the prompt, so angles round differently


def test_entropy_in_one_pass_is_estimated_from_the_sampled_tokens(tmp_path):
    trainer = tiny_trainer(tmp_path, student=tiny_model(0), method="opd", opd_loss="one_pass", max_steps=1)
    trainer.train()
    plain = tiny_trainer(tmp_path, student=tiny_model(0), method="opd", opd_loss="trl", max_steps=1)
    plain.train()
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(plain.state.log_history[0]["entropy"], rel=0.15)
