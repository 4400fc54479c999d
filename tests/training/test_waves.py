"""Rollouts that are looked at in waves of any sizes give the losses and gradients of one wave."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_trainer

import topd.training.step
from topd.algorithm import Transport
from topd.near_future import Places, Rollouts, Windows
from topd.training.method import Futures, Look, Method, StepContext

METHODS = [
    {"method": "topd"},
    {"method": "topd", "cap_false_alarms": True},
    {"method": "topd", "guidance_context": "teacher"},
    {"method": "topd", "fork_rule": "batch_quantile"},
    {"method": "opd-capped"},
]
UNEVEN = [1, 3, 1]
"""The first wave is smaller than the second, and so is the last: no wave's size times its number gives its rows."""


def step_in_waves(folder, monkeypatch, sizes, options):
    """Loss and gradient of one step on five rollouts, and the rows of its candidates."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    slices = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    rows, plain = [], topd.training.step.look_ahead

    def look_ahead(*args, **kwargs):
        future = plain(*args, **kwargs)
        rows.append(future.candidates.places.rows.tolist())
        return future

    trainer = tiny_trainer(
        folder, student=tiny_model(0, 32), teacher=tiny_model(1, 48), per_device_train_batch_size=5,
        max_completion_length=12, window_length=4, candidate_share=0.2, **options,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(topd.training.step, "waves", lambda *_: slices)
        patch.setattr("topd.training.trainer.look_ahead", look_ahead)
        loss = trainer.training_step(trainer.model, [trainer.train_dataset[index] for index in range(5)])
    return loss, torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]), rows


@pytest.mark.parametrize("window", ["rollout", "candidate", "regenerated"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_uneven_waves_train_as_one_wave_does(tmp_path, monkeypatch, method, window):
    options = method | {"student_window": window, "guidance_weight": 1.0}
    loss, gradient, rows = step_in_waves(tmp_path / "one", monkeypatch, [5], options)
    assert set(rows[0]) == set(range(5))
    again, its_gradient, its_rows = step_in_waves(tmp_path / "uneven", monkeypatch, UNEVEN, options)
    assert its_rows == rows
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
    assert (its_gradient - gradient).norm() <= 1e-4 * gradient.norm()


def test_rows_follow_those_of_the_waves_before():
    def look(rollouts, rows):
        rows = torch.tensor(rows)
        windows = Windows(rows[:, None], rows[:, None] >= 0)
        nothing = torch.zeros(rollouts, 1)
        places = Places(Rollouts(*[nothing] * 5), rows, rows)
        futures = Futures(places, windows, windows, Transport(nothing[rows, :, None], *[nothing[rows, 0]] * 3))
        return Look(nothing, nothing, nothing, {"hidden": nothing[..., None]}, futures, futures)

    found = Look.cat([look(2, [0, 1]), look(3, [0, 2]), look(1, [0])])
    for futures in (found.candidates, found.low_loss):
        assert futures.places.rows.tolist() == [0, 1, 2, 4, 5]
        assert futures.places.positions.tolist() == [0, 1, 0, 2, 0]
        assert len(futures.places.rollouts) == 6


@pytest.mark.parametrize(("kept", "count"), [(0.0, 1), (2.0**30, 5)])
def test_rollouts_are_looked_at_together_where_nothing_is_kept(kept, count):
    """Requests to a server then run side by side."""
    one, mask = torch.ones(5, 4, dtype=torch.long), torch.ones(5, 4, dtype=torch.long)
    model = SimpleNamespace(cache_bytes_per_token=kept)
    waves = topd.training.step.waves(Rollouts(one, mask, one, mask, mask), model, model, Method(), StepContext())
    assert len(waves) == count
