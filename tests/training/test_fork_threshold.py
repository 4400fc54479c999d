"""The fork threshold of section 2.1, as it is estimated while training."""

import math

import pytest
import torch
from tiny import tiny_trainer

import topd.training.step
from topd.training.method import MOST_STEPS, WANTED, LowLossQuartile


def test_the_first_estimate_is_used_from_its_first_step_on_and_grows():
    quartile = LowLossQuartile(every=50)
    assert quartile.due(0)
    quartile.add(0, torch.tensor([0.0, 0.1, 0.2, 0.3, math.nan]))
    assert quartile.value == pytest.approx(0.225)
    assert quartile.due(1)
    quartile.add(1, torch.tensor([0.4]))
    assert quartile.value == pytest.approx(0.3)


def test_it_is_complete_with_enough_distances_or_after_enough_steps():
    quick = LowLossQuartile(every=50)
    quick.add(0, torch.rand(WANTED))
    assert not any(quick.due(step) for step in range(1, 50))
    slow = LowLossQuartile(every=50)
    for step in range(50):
        if slow.due(step):
            assert step < MOST_STEPS
            slow.add(step, torch.tensor([0.1 * step]))
    assert slow.due(50)


def test_a_later_estimate_replaces_the_value_once_it_is_complete():
    quartile = LowLossQuartile(every=10)
    quartile.add(0, torch.full((WANTED,), 0.2))
    quartile.add(10, torch.full((WANTED // 2,), 0.6))
    assert quartile.value == pytest.approx(0.2)
    quartile.add(11, torch.full((WANTED // 2,), 0.6))
    assert quartile.value == pytest.approx(0.6)
    assert not quartile.due(12)


def test_a_later_estimate_has_no_distances_of_an_earlier_one_that_stayed_incomplete():
    """A budget's plain steps look at no low-loss positions, so eight steps may not be reached."""
    quartile = LowLossQuartile(every=50)
    for step in (0, 2, 3, 5, 6):
        quartile.add(step, torch.tensor([0.2] * 10))
    for step in range(50, 58):
        quartile.add(step, torch.tensor([0.6] * 10))
    assert quartile.value == pytest.approx(0.6)
    assert len(quartile._distances) == 80


def test_training_logs_it_and_a_resumed_run_keeps_it(tmp_path):
    options = {"max_steps": 6, "recalibration_steps": 4, "save_strategy": "steps", "save_steps": 3}
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train()
    thresholds = [entry["forks/threshold"] for entry in trainer.state.log_history if "forks/threshold" in entry]
    assert len(thresholds) == 6
    assert all(0 < threshold < 2 for threshold in thresholds)
    assert sum(entry.get("seconds/calibration", 0) > 0 for entry in trainer.state.log_history) >= 2
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = [entry["forks/threshold"] for entry in resumed.state.log_history if "forks/threshold" in entry]
    assert again == thresholds


def test_a_run_without_any_distance_warns_once_and_logs_no_share(tmp_path, caplog, monkeypatch):
    plain = topd.training.step.near_future_transport

    def unknown(*args, **kwargs):
        found = plain(*args, **kwargs)
        return found._replace(distance=found.distance * math.nan, converged=found.converged & False)

    monkeypatch.setattr(topd.training.step, "near_future_transport", unknown)
    trainer = tiny_trainer(tmp_path, max_steps=2)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert sum("no candidate has a transport distance" in record.message for record in caplog.records) == 1
    assert not any("false_alarm_share" in entry for entry in trainer.state.log_history)
