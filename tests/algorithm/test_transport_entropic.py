"""What only the entropic solver does: it approximates, and it says how well."""

import math

import numpy
import oracles
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import entropic_transport, exact_transport

EPSILONS = st.sampled_from([0.3, 0.6, 2.0])
lengths = st.integers(1, 6)


def problem(rows: int, columns: int, seed: int, windows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(windows, rows, columns, generator=generator, dtype=torch.float64)
    return cost, torch.ones(windows, rows, dtype=torch.bool), torch.ones(windows, columns, dtype=torch.bool)


@given(rows=lengths, columns=lengths, seed=st.integers(0, 2**20), epsilon=EPSILONS)
def test_the_plan_is_that_of_the_oracle_and_of_pot(rows: int, columns: int, seed: int, epsilon: float) -> None:
    case = problem(rows, columns, seed)
    plan = entropic_transport(*case, epsilon=epsilon, tolerance=1e-9, max_iterations=20_000).plan[0]
    absolute = epsilon * float(case[0].mean())
    assert_close(plan, oracles.entropic_plan(case[0][0], absolute, iterations=20_000), atol=1e-6, rtol=0)
    witness = ot.sinkhorn(
        numpy.full(rows, 1 / rows), numpy.full(columns, 1 / columns), case[0][0].numpy(), absolute, stopThr=1e-10
    )
    assert_close(plan, torch.from_numpy(witness), atol=1e-6, rtol=0)


@given(rows=lengths, columns=lengths, seed=st.integers(0, 2**20), epsilon=EPSILONS)
def test_the_distance_is_at_least_the_exact_one_and_exceeds_it_by_the_entropy_at_most(
    rows: int, columns: int, seed: int, epsilon: float
) -> None:
    case = problem(rows, columns, seed)
    entropic = entropic_transport(*case, epsilon=epsilon, tolerance=1e-9, max_iterations=20_000).distance.item()
    excess = entropic - exact_transport(*case).distance.item()
    # <P, C> - epsilon H(P) <= <P*, C> - epsilon H(P*), H(P) <= log rows + log columns, H(P*) >= log max(rows, columns)
    assert -1e-7 <= excess <= epsilon * float(case[0].mean()) * math.log(min(rows, columns)) + 1e-7


def test_two_tokens_worked_by_hand() -> None:
    # Swapping costs 1, staying 0. By symmetry the plan is [[x, 1/2 - x], [1/2 - x, x]], x / (1/2 - x) = e^(1 / eps);
    # the mean cost is 1/2, so 2 / log 3 times it makes that 3: x = 3/8, the distance is 2 * 1/8. The exact one is 0.
    _cost, student_mask, teacher_mask = problem(2, 2, 0)
    transport = entropic_transport(
        1 - torch.eye(2, dtype=torch.float64)[None], student_mask, teacher_mask, epsilon=2 / math.log(3)
    )
    assert_close(transport.plan.tolist(), [[[0.375, 0.125], [0.125, 0.375]]])
    assert_close(transport.distance.tolist(), [0.25])


def test_a_small_epsilon_comes_to_the_exact_plan_and_a_large_one_to_no_plan_at_all() -> None:
    case = problem(5, 3, seed=1, windows=4)
    exact = exact_transport(*case)
    sharp = entropic_transport(*case, epsilon=1e-3, max_iterations=20_000, tolerance=1e-6)
    assert sharp.converged.all()
    assert_close(sharp.distance, exact.distance, atol=1e-4, rtol=0)
    assert_close(sharp.plan, exact.plan, atol=1e-2, rtol=0)
    blurred = entropic_transport(*case, epsilon=1e5)
    assert_close(blurred.plan, torch.full_like(exact.plan, 1 / 15), atol=1e-5, rtol=0)


def test_epsilon_means_the_same_whatever_the_unit_of_the_cost() -> None:
    cost, student_mask, teacher_mask = problem(6, 4, seed=5, windows=3)
    student_mask[0, 4:] = False
    cost[0, 4:] = 1e6  # padding does not count
    one, thousandfold = (
        entropic_transport(cost * unit, student_mask, teacher_mask, epsilon=0.5) for unit in (1.0, 1000.0)
    )
    assert_close(one.plan, thousandfold.plan)
    assert_close(1000 * one.distance, thousandfold.distance)


def test_identical_windows_have_a_distance() -> None:
    _, student_mask, teacher_mask = problem(3, 3, seed=3)
    transport = entropic_transport(torch.zeros(1, 3, 3), student_mask, teacher_mask)
    assert transport.converged.all()
    assert transport.distance.tolist() == [0.0]


def test_a_window_that_misses_the_tolerance_has_no_distance_and_says_so() -> None:
    cost, student_mask, teacher_mask = problem(6, 4, seed=2, windows=2)
    cost[0] = 0.5  # done after one iteration; the other needs more
    transport = entropic_transport(cost, student_mask, teacher_mask, epsilon=0.005, max_iterations=3, tolerance=1e-6)
    assert transport.converged.tolist() == [True, False]
    assert transport.distance.isnan().tolist() == [False, True]
    assert transport.marginal_error[0] <= 1e-6 < transport.marginal_error[1]
    more = entropic_transport(cost, student_mask, teacher_mask, epsilon=0.005, max_iterations=50_000, tolerance=1e-6)
    assert more.converged.all()
    assert (more.marginal_error <= 1e-6).all()


@given(rows=lengths, columns=lengths, seed=st.integers(0, 2**20), tolerance=st.sampled_from([1e-2, 1e-4, 1e-8]))
def test_converged_means_within_the_tolerance(rows: int, columns: int, seed: int, tolerance: float) -> None:
    case = problem(rows, columns, seed)
    for most in (1, 7, 40):
        transport = entropic_transport(*case, epsilon=0.02, max_iterations=most, tolerance=tolerance)
        error = oracles.marginal_error(transport.plan[0], rows, columns)
        assert_close(transport.marginal_error.item(), error, atol=1e-12, rtol=1e-9)
        assert transport.converged.item() == (error <= tolerance) == (not transport.distance.isnan().item())


def test_costs_far_beyond_epsilon_neither_overflow_nor_vanish() -> None:
    cost, student_mask, teacher_mask = problem(3, 3, seed=3)
    huge = cost * 0 + 100.0 * torch.tensor([[2.0, 1, 5], [3, 4, 1], [1, 6, 7]])
    transport = entropic_transport(huge, student_mask, teacher_mask, epsilon=0.01)  # exp(-100 / 0.01) is 0 in float64
    assert_close(transport.distance.tolist(), [100.0])


def test_a_cost_that_is_not_a_number_costs_the_other_windows_no_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(3, 4, seed=4, windows=2)
    calls = []
    whole = Tensor.logsumexp
    monkeypatch.setattr(Tensor, "logsumexp", lambda *a, **k: calls.append(1) or whole(*a, **k))
    entropic_transport(*case, epsilon=1.0)
    clean = len(calls)
    case[0][0, 0, 0] = math.nan
    transport = entropic_transport(*case, epsilon=1.0)
    assert len(calls) == 2 * clean
    assert transport.plan.isfinite().all()
