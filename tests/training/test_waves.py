"""Rollouts that are looked at in waves of any sizes give the losses and gradients of one wave."""

import pytest
import torch
from tiny import tiny_trainer

import topd.training.step
from topd.algorithm import Transport
from topd.near_future import Places, Rollouts, Windows
from topd.training.futures import Futures, Look

METHODS = [
    {"method": "topd"},
    {"method": "topd", "cap_false_alarms": True},
    {"method": "topd", "guidance_context": "teacher"},
    {"method": "topd", "fork_rule": "batch_quantile"},
    {"method": "opd-capped"},
]


def trained(folder, monkeypatch, sizes, options):
    """Losses of two steps, the student's weights after them, and the rows of the candidates."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    slices = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    rows, plain = [], topd.training.step.look_ahead

    def look_ahead(*args, **kwargs):
        future = plain(*args, **kwargs)
        rows.append(future.candidates.places.rows.tolist())
        return future

    with monkeypatch.context() as patch:
        patch.setattr(topd.training.step, "waves", lambda *_: slices)
        patch.setattr("topd.training.trainer.look_ahead", look_ahead)
        trainer = tiny_trainer(folder, max_steps=2, per_device_train_batch_size=5, **options)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return losses, weights, rows


@pytest.mark.parametrize("window", ["rollout", "candidate", "regenerated"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_uneven_waves_train_as_one_wave_does(tmp_path, monkeypatch, method, window):
    options = method | {"student_window": window, "guidance_weight": 1.0}
    losses, weights, rows = trained(tmp_path / "one", monkeypatch, [5], options)
    for sizes in ([2, 2, 1], [1, 3, 1]):
        again = trained(tmp_path / "uneven", monkeypatch, sizes, options)
        assert again[2] == rows
        assert again[0] == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(again[1], weights, rtol=1e-3, atol=1e-5)


def test_rows_follow_those_of_the_waves_before():
    def look(rollouts, rows):
        rows = torch.tensor(rows)
        windows = Windows(rows[:, None], rows[:, None] >= 0)
        nothing = torch.zeros(rollouts, 1)
        places = Places(Rollouts(*[nothing] * 5), rows, rows)
        futures = Futures(places, windows, windows, Transport(nothing[rows, :, None], *[nothing[rows, 0]] * 3))
        return Look(nothing, nothing, {"hidden": nothing[..., None]}, futures, futures)

    found = Look.cat([look(2, [0, 1]), look(3, [0, 2]), look(1, [0])])
    for futures in (found.candidates, found.low_loss):
        assert futures.places.rows.tolist() == [0, 1, 2, 4, 5]
        assert futures.places.positions.tolist() == [0, 1, 0, 2, 0]
        assert len(futures.places.rollouts) == 6
