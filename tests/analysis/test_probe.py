"""The probe on pairs with known answers."""

import numpy
import pytest
import torch
from tiny import TOKENIZER, tiny_model

from topd.analysis.probe import Probe, probe
from topd.demo.task import make_problems
from topd.near_future.sampling import local_pair, sample_rollouts


def run(student, teacher):
    torch.manual_seed(0)
    texts = [problem.prompt for problem in make_problems(6, 0, held_out=False)]
    rollouts = sample_rollouts(student, TOKENIZER, texts, max_new_tokens=20)
    return probe(*local_pair(student, teacher, TOKENIZER), rollouts, window_length=5, share=0.1)


def test_a_model_does_not_part_from_itself():
    model = tiny_model(0)
    found = run(model, model)
    assert all((distances == 0).all() for distances in found.distances.values())
    assert found.false_alarm_share == 1


def test_different_models_part():
    found = run(tiny_model(0), tiny_model(1, width=96))
    assert numpy.median(found.distances["high"]) > 0.1
    assert len({len(distances) for distances in found.distances.values()}) == 1


def test_the_share_by_hand_and_its_interval():
    distances = {"low": numpy.array([0.0, 0.1, 0.2, 0.3]), "high": numpy.array([0.1, 0.2, 0.5, 0.9])}
    found = Probe(distances | {"random": distances["low"]}, dict.fromkeys(("low", "high", "random"), numpy.arange(4)))
    assert found.threshold == pytest.approx(0.225)  # linear between 0.2 and 0.3
    assert found.false_alarm_share == 0.5
    low, high = found.interval(samples=500)
    assert low <= 0.5 <= high
