"""The budget finds, from noisy steps, the number of candidates that a known cost allows."""

import numpy
import pytest

from topd.training.budget import ROUNDS, CandidateBudget, CostModel

TRUE = CostModel(sampling=1e-3, plain=5e-4, fixed=2e-5, each=8e-3)


def measured(max_overhead, usual=20, noise=0.0, true=TRUE, seed=0):
    rng = numpy.random.default_rng(seed)
    budget = CandidateBudget(max_overhead)
    for _ in ROUNDS:
        tokens, rollouts = float(rng.integers(6000, 10000)), 8.0
        at_most = budget.max_candidates()
        candidates = rollouts * (usual if at_most is None else min(usual, at_most))
        rest = true.plain * tokens + (true.fixed * tokens + true.each * candidates if candidates else 0.0)
        rest *= 1 + noise * rng.standard_normal()
        budget.record({"rollout": true.sampling * tokens, "loss": rest}, tokens, rollouts, candidates)
    assert not budget.measuring
    return budget, tokens / rollouts


def test_the_true_cost_is_found():
    budget, _ = measured(0.10)
    assert budget.model.plain == pytest.approx(TRUE.plain)
    assert budget.model.fixed == pytest.approx(TRUE.fixed)
    assert budget.model.each == pytest.approx(TRUE.each)
    assert budget.model.sampling == pytest.approx(TRUE.sampling)


def test_as_many_candidates_as_the_budget_allows_and_no_more():
    budget, length = measured(0.05, usual=20)
    assert TRUE.overhead(budget.per_rollout / length) <= 0.05 < TRUE.overhead((budget.per_rollout + 1) / length)
    assert 1 < budget.max_candidates() < 20


def test_never_more_than_the_usual_number_and_at_least_one():
    assert measured(5.0, usual=20)[0].max_candidates() == 20
    assert measured(0.001, usual=20)[0].max_candidates() == 1


def test_noise_of_two_percent_moves_the_answer_little():
    exact = measured(0.05)[0].per_rollout
    for seed in range(20):
        assert abs(measured(0.05, noise=0.02, seed=seed)[0].per_rollout - exact) <= 0.6 * exact


def test_a_fall_in_time_with_more_candidates_is_noise_and_limits_nothing():
    odd = CostModel(sampling=1e-3, plain=5e-4, fixed=1e-5, each=-1e-4)
    assert measured(0.10, true=odd)[0].max_candidates() == 20
    assert measured(0.10, true=CostModel(1e-3, 5e-4, 1e-3, 0.0))[0].max_candidates() == 1


@pytest.mark.parametrize(("fixed", "left"), [(10.0, 1), (-10.0, 8)])
def test_candidates_that_seem_to_cost_nothing_do_not_stop_a_run(fixed, left):
    """Noise can make the steps with all candidates the faster ones."""
    budget = CandidateBudget(max_overhead=0.1)
    for kind in ROUNDS:
        candidates = {"plain": 0.0, "half": 4.0}.get(kind, 8.0)
        rest = 20.0 if kind == "plain" else 20.0 + fixed - 0.1 * candidates
        budget.record({"rollout": 10.0, "loss": rest}, tokens=100.0, rollouts=1.0, candidates=candidates)
    assert budget.per_rollout == left
