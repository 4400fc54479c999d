"""`guidance/grad_ratio`: how strong guidance is next to OPD."""

import pytest
import torch
from tiny import tiny_trainer
from torch import nn

from topd.training import TOPDTrainer
from topd.training.losses import gradient_ratio, last_parameters


def test_it_is_the_ratio_of_the_gradients_norms_and_keeps_the_graph():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    states = layers(torch.randn(3, 4))
    parameters = list(layers.parameters())
    ratio = gradient_ratio(states, parameters, lambda s: 0.1 * s.square().sum(), lambda s: s.sum())
    guidance = torch.autograd.grad(0.1 * states.square().sum(), parameters, retain_graph=True)
    opd = torch.autograd.grad(states.sum(), parameters, retain_graph=True)
    norms = [torch.cat([each.flatten() for each in gradients]).norm() for gradients in (guidance, opd)]
    assert ratio.item() == pytest.approx((norms[0] / norms[1]).item(), rel=1e-5)
    states.sum().backward()


def test_where_the_last_parameters_are_not_the_text_s_there_is_no_ratio():
    states, image = nn.Linear(2, 2)(torch.randn(3, 2)), nn.Linear(2, 2)
    assert gradient_ratio(states, list(image.parameters()), lambda s: s.square().sum(), lambda s: s.sum()) is None


def test_only_trainable_parameters_count():
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    layers[-1].requires_grad_(False)
    assert last_parameters(layers)[-1] is layers[-2].bias


@pytest.mark.parametrize("options", [{}, {"student_window": "regenerated"}, {"guidance_context": "teacher"}], ids=str)
def test_training_logs_it_every_ten_steps_in_proportion_to_lambda(tmp_path, options):
    found = {}
    for weight in (0.03, 0.3):
        trainer = tiny_trainer(tmp_path, max_steps=2, guidance_weight=weight, **options)
        trainer.train()
        found[weight] = [e["guidance/grad_ratio"] for e in trainer.state.log_history if "guidance/grad_ratio" in e]
        assert len(found[weight]) == 1
    assert found[0.3][0] == pytest.approx(10 * found[0.03][0], rel=1e-3)


def test_measuring_it_changes_no_step(tmp_path, monkeypatch):
    weights = []
    for measures in (True, False):
        monkeypatch.setattr(TOPDTrainer, "_measures_gradients", lambda self, measures=measures: measures)
        trainer = tiny_trainer(tmp_path, max_steps=2, gradient_checkpointing=True)
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_reentrant_checkpointing_through_which_it_cannot_be_measured_trains_without_it(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=1, fork_threshold=0.0, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    trainer.train()
    (step,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert step["guidance/positions"] > 0
    assert "guidance/grad_ratio" not in step
