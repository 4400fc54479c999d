"""Solvers: `exact_transport` and `entropic_transport`."""

import inspect
import math
from collections.abc import Callable

import numpy
import oracles
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import Transport, entropic_transport, exact_transport, token_cost

TOLERANCE = 1e-10


def tight_entropic(cost: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Transport:
    return entropic_transport(cost, student_mask, teacher_mask, epsilon=0.2, max_iterations=20_000, tolerance=TOLERANCE)


Solver = Callable[[Tensor, Tensor, Tensor], Transport]
solvers = pytest.mark.parametrize("solve", [exact_transport, tight_entropic], ids=["exact", "entropic"])


def masks(lengths: list[int], width: int) -> Tensor:
    """True at the first `length` places of each row."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@st.composite
def windows(draw: st.DrawFn, shortest: int = 0, longest: int = 5, fewest: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Costs in 0..1 (half the time in steps of 1/4, so that many plans are optimal) and lengths that all differ."""
    count, lengths = draw(st.integers(fewest, 4)), st.integers(shortest, longest)
    rows, columns = ([draw(lengths) for _ in range(count)] for _ in range(2))
    width = max(rows) + draw(st.integers(0, 2)), max(columns) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    cost = torch.rand(count, *width, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        cost = (cost * 4).round() / 4
    return cost, masks(rows, width[0]), masks(columns, width[1])


Case = tuple[Tensor, Tensor, Tensor]


def blocks(cost: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> list[tuple[int, Tensor]]:
    """The cost of each window that has tokens on both sides, without padding."""
    lengths = zip(student_mask.sum(-1).tolist(), teacher_mask.sum(-1).tolist(), strict=True)
    return [(window, cost[window, :n, :m]) for window, (n, m) in enumerate(lengths) if n and m]


def test_three_tokens_worked_by_hand() -> None:
    # The cheapest pairs are (0, 1), (1, 2), (2, 0): (2 + 3 + 1) / 3. Read the wrong way round, (1, 0), (2, 1), (0, 2)
    # cost (5 + 8 + 9) / 3; the diagonal costs (1 + 4 + 9) / 3. Rows 0 and 2 both like column 0 best.
    cost = torch.tensor([[[1.0, 2, 9], [5, 4, 3], [1, 8, 9]]])
    transport = exact_transport(cost, masks([3], 3), masks([3], 3))
    assert_close(transport.distance.tolist(), [2.0])
    assert_close(transport.plan, torch.tensor([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]]) / 3)
    assert transport.converged.tolist() == [True]


def test_two_student_tokens_and_three_teacher_tokens_worked_by_hand() -> None:
    # Rows hold 1/2, columns 1/3. The free pairs take 1/3 each; the 1/6 that each row has left goes to column 1.
    cost = torch.tensor([[[0.0, 1, 4], [3, 1, 0]]])
    transport = exact_transport(cost, masks([2], 2), masks([3], 3))
    assert_close(transport.plan, torch.tensor([[[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]]]))
    assert_close(transport.distance.tolist(), [1 / 3])


def test_plans_that_differ_by_little_are_told_apart_in_float64() -> None:
    # The two cases above, with costs that only float64 can tell apart.
    square = 1 + 1e-9 * torch.tensor([[[1.0, 2, 9], [5, 4, 3], [1, 8, 9]]], dtype=torch.float64)
    assert exact_transport(square, masks([3], 3), masks([3], 3)).plan[0].argmax(-1).tolist() == [1, 2, 0]
    ragged = 1 + 1e-9 * torch.tensor([[[0.0, 1, 4], [3, 1, 0]]], dtype=torch.float64)
    plan = exact_transport(ragged, masks([2], 2), masks([3], 3)).plan
    assert_close(plan, torch.tensor([[[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]]], dtype=torch.float64))


@given(case=windows(longest=3))
def test_the_exact_distance_is_that_of_the_oracle(case: Case) -> None:
    distance = exact_transport(*case).distance
    for window, block in blocks(*case):
        assert_close(distance[window].item(), oracles.transport_distance(block))


@given(case=windows(shortest=1, longest=9))
def test_the_exact_distance_is_that_of_pot_and_of_linear_programming(case: Case) -> None:
    distance = exact_transport(*case).distance
    for window, block in blocks(*case):
        n, m = block.shape
        a, b = numpy.full(n, 1 / n), numpy.full(m, 1 / m)
        assert_close(distance[window].item(), float(ot.emd2(a, b, block.numpy())), atol=1e-9, rtol=0)
        sums = numpy.vstack([numpy.kron(numpy.eye(n), numpy.ones(m)), numpy.kron(numpy.ones(n), numpy.eye(m))])
        program = linprog(block.flatten().numpy(), A_eq=sums, b_eq=numpy.concatenate([a, b]))
        assert_close(distance[window].item(), float(program.fun), atol=1e-9, rtol=0)


@given(case=windows(shortest=1, longest=3))
def test_among_equally_cheap_plans_the_one_that_moves_tokens_least_is_taken(case: Case) -> None:
    plan = exact_transport(*case).plan
    for window, block in blocks(*case):
        n, m = block.shape
        moved = (torch.arange(n).double().sqrt()[:, None] - torch.arange(m).double().sqrt()).square() / max(n, m)
        assert_close((plan[window, :n, :m] * moved).sum().item(), oracles.least_moved(block), atol=1e-9, rtol=0)


def test_repeated_tokens_worked_by_hand() -> None:
    table = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]])
    # The 0s stay in order, and 1 and 2 find themselves; a 0 and the 2 that are left over go to each other.
    ours, theirs = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 2], [1, 1, 1, 1]])
    plan = exact_transport(token_cost(ours, theirs, table), masks([4, 4], 4), masks([4, 4], 4)).plan
    assert plan.argmax(-1).tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]]
    # Three tokens onto two of the same kind, in order: a row holds 1/3, a column 1/2.
    ragged = exact_transport(torch.zeros(1, 3, 2, dtype=torch.float64), masks([3], 3), masks([2], 2)).plan
    assert_close(ragged.tolist(), [[[1 / 3, 0.0], [1 / 6, 1 / 6], [0.0, 1 / 3]]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "vocabulary"), [(5, 2), (17, 4), (50, 2), (50, 12), (50, 200)])
def test_where_tokens_repeat_another_solver_takes_the_same_plan(
    dtype: torch.dtype, length: int, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(length * vocabulary)
    table = torch.randn(vocabulary, 16, generator=generator).to(dtype)
    ours, theirs = torch.randint(vocabulary, (2, 30, length), generator=generator)
    cost = token_cost(ours, theirs, table)
    plan = exact_transport(cost, masks([length] * 30, length), masks([length] * 30, length)).plan
    line = numpy.sqrt(numpy.arange(length))
    for window, block in enumerate(cost.double().numpy()):
        settled = block + 1e-8 * numpy.ptp(block) * (line[:, None] - line) ** 2 / length
        assert plan[window].argmax(-1).tolist() == linear_sum_assignment(settled)[1].tolist()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_large_batch_of_long_windows_is_that_of_pot(mixed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(400, 32, generator=generator)
    ours, theirs = torch.randint(400, (2, 230, 50), generator=generator)
    lengths = torch.randint(35, 51, (2, 230), generator=generator) if mixed else torch.full((2, 230), 50)
    case = token_cost(ours, theirs, table), masks(lengths[0].tolist(), 50), masks(lengths[1].tolist(), 50)
    transport = exact_transport(*case)
    assert transport.converged.all()
    assert transport.marginal_error.max() < 1e-6
    for window, block in blocks(*case):
        cost = block.double().numpy()
        a, b = (numpy.full(length, 1 / length) for length in cost.shape)
        assert_close(transport.distance[window].item(), float(ot.emd2(a, b, cost)), atol=1e-6, rtol=0)


def test_a_network_simplex_that_gives_up_leaves_its_window_unconverged(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ot.emd
    monkeypatch.setattr(ot, "emd", lambda *args, numItermax, **options: plain(*args, numItermax=2, **options))
    cost = torch.rand(2, 20, 21, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="numItermax"):
        transport = exact_transport(cost, masks([20, 20], 20), masks([21, 20], 21))
    assert transport.converged.tolist() == [False, True]
    assert transport.distance.isnan().tolist() == [True, False]
    assert (transport.plan[0] == 0).all()


@pytest.mark.parametrize("factor", [2.0**-900, 2.0**-60, 2.0**60, 2.0**900])
@pytest.mark.parametrize("zero", [0.0, 2.0**30])
def test_the_scale_and_the_zero_of_the_cost_change_no_plan_even_among_ties(factor: float, zero: float) -> None:
    cost = torch.randint(4, (3, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    lengths = masks([6, 6, 4], 6), masks([6, 5, 4], 6)
    plain, other = exact_transport(cost, *lengths), exact_transport((cost + zero) * factor, *lengths)
    assert torch.equal(plain.plan, other.plan)
    assert_close(other.distance, (plain.distance + zero) * factor, atol=0, rtol=1e-12)


def test_several_threads_find_the_same() -> None:
    cost = torch.rand(64, 20, 20, generator=torch.Generator().manual_seed(0))
    case, threads = (cost, masks([20] * 64, 20), masks([20] * 64, 20)), torch.get_num_threads()
    alone = exact_transport(*case)
    try:
        torch.set_num_threads(3)
        together = exact_transport(*case)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.plan, together.plan)


@given(length=st.integers(1, 9), padding=st.integers(0, 3), seed=st.integers(0, 2**20))
def test_between_equal_lengths_the_plan_is_the_best_assignment(length: int, padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(1, length + padding, length + 2, generator=generator, dtype=torch.float64)
    transport = exact_transport(cost, masks([length], length + padding), masks([length], length + 2))
    block = cost[0, :length, :length].numpy()
    rows, columns = linear_sum_assignment(block)
    assert_close(transport.distance.item(), float(block[rows, columns].mean()))
    assert (transport.plan[0, rows, columns] == 1 / length).all()  # each pair has mass 1/K, ...
    assert int((transport.plan > 0).sum()) == length  # ... and nothing else has any


@solvers
@given(case=windows())
def test_a_plan_has_uniform_marginals_total_mass_one_and_nothing_at_padding(solve: Solver, case: Case) -> None:
    _cost, student_mask, teacher_mask = case
    transport = solve(*case)
    there = student_mask[:, :, None] & teacher_mask[:, None, :]
    assert (transport.plan >= 0).all()
    assert (transport.plan[~there] == 0).all()
    for window, block in blocks(*case):
        n, m = block.shape
        plan = transport.plan[window, :n, :m]
        assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-9, rtol=0)
        assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64), atol=1e-9, rtol=0)
        assert_close(transport.marginal_error[window].item(), oracles.marginal_error(plan, n, m), atol=1e-12, rtol=0)
        assert_close(transport.distance[window], (plan * block).sum())


@given(case=windows(shortest=1, longest=6), seed=st.integers(0, 2**20))
def test_no_feasible_plan_is_cheaper_than_the_exact_one(case: Case, seed: int) -> None:
    distance = exact_transport(*case).distance
    generator = torch.Generator().manual_seed(seed)
    for window, block in blocks(*case):
        n, m = block.shape
        any_cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
        for plan in (torch.full((n, m), 1 / (n * m)), oracles.entropic_plan(any_cost, 0.3, iterations=300)):
            assert distance[window] <= (plan * block).sum() + 1e-9


@solvers
@given(case=windows())
def test_swapping_the_roles_transposes_the_problem_and_keeps_the_distance(solve: Solver, case: Case) -> None:
    cost, student_mask, teacher_mask = case
    forth, back = solve(*case), solve(cost.mT.contiguous(), teacher_mask, student_mask)
    assert_close(forth.distance, back.distance, atol=1e-8, rtol=0, equal_nan=True)
    assert_close((back.plan.mT * cost).sum((1, 2)), (forth.plan * cost).sum((1, 2)), atol=1e-8, rtol=0)


@given(length=st.integers(1, 7), seed=st.integers(0, 2**20))
def test_a_window_is_at_distance_zero_from_itself_in_any_order(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    line = torch.randint(0, 4, (length,), generator=generator).double()  # some tokens occur twice
    cost = (line[:, None] - line[torch.randperm(length, generator=generator)]).abs()[None]
    transport = exact_transport(cost, masks([length], length), masks([length], length))
    assert transport.distance.tolist() == [0.0]
    assert transport.converged.all()


@solvers
@given(case=windows(fewest=2), seed=st.integers(0, 2**20))
def test_a_batch_equals_the_loop_and_follows_a_permutation(solve: Solver, case: Case, seed: int) -> None:
    batch = solve(*case)
    loop = [solve(*(each[[window]] for each in case)) for window in range(len(case[0]))]
    order = torch.randperm(len(case[0]), generator=torch.Generator().manual_seed(seed))
    permuted = solve(*(each[order] for each in case))
    for field in ("plan", "distance", "converged"):
        alone = torch.cat([getattr(one, field) for one in loop])
        assert_close(getattr(batch, field), alone, atol=1e-8, rtol=0, equal_nan=True)
        assert_close(getattr(permuted, field), getattr(batch, field)[order], atol=1e-8, rtol=0, equal_nan=True)


@solvers
@given(case=windows(), rows=st.integers(0, 3), columns=st.integers(0, 3), junk=st.sampled_from([0.0, -9.0, 1e6]))
def test_padding_changes_nothing_whatever_it_costs(
    solve: Solver, case: Case, rows: int, columns: int, junk: float
) -> None:
    cost, student_mask, teacher_mask = case
    there = student_mask[:, :, None] & teacher_mask[:, None, :]
    pad = torch.nn.functional.pad
    wide = pad(torch.where(there, cost, junk), (0, columns, 0, rows), value=junk)
    before, after = solve(*case), solve(wide, pad(student_mask, (0, rows)), pad(teacher_mask, (0, columns)))
    assert_close(after.plan, pad(before.plan, (0, columns, 0, rows)))
    for field in ("distance", "converged", "marginal_error"):
        assert_close(getattr(after, field), getattr(before, field), equal_nan=True)


@solvers
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_padding_changes_nothing_even_where_its_cost_is_not_finite(solve: Solver, junk: float) -> None:
    cost = torch.full((1, 3, 4), junk)
    cost[0, :2, :3] = torch.tensor([[0.0, 1, 4], [3, 1, 0]])
    padded, plain = solve(cost, masks([2], 3), masks([3], 4)), solve(cost[:, :2, :3], masks([2], 2), masks([3], 3))
    assert padded.converged.all()
    assert_close(padded.distance, plain.distance)


@solvers
def test_an_empty_window_has_no_distance_and_no_plan(solve: Solver) -> None:
    transport = solve(torch.rand(4, 3, 5), masks([0, 2, 0, 3], 3), masks([4, 0, 0, 5], 5))
    assert transport.converged.tolist() == [False, False, False, True]
    assert transport.distance.isnan().tolist() == [True, True, True, False]
    assert (transport.plan[:3] == 0).all()


@solvers
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_transport_is_no_error(solve: Solver, shape: tuple[int, int, int]) -> None:
    transport = solve(
        torch.zeros(shape), masks([shape[1]] * shape[0], shape[1]), masks([shape[2]] * shape[0], shape[2])
    )
    assert transport.plan.shape == shape
    assert not transport.converged.any()
    assert transport.distance.isnan().all()


@solvers
def test_one_token_goes_to_all_tokens_of_the_other_window(solve: Solver) -> None:
    cost = torch.tensor([[[0.2, 0.4, 0.9]], [[0.7, 0.0, 0.0]]], dtype=torch.float64)
    transport = solve(cost, masks([1, 1], 1), masks([3, 1], 3))
    assert_close(transport.plan.tolist(), [[[1 / 3, 1 / 3, 1 / 3]], [[1.0, 0.0, 0.0]]], atol=1e-9, rtol=0)
    assert_close(transport.distance.tolist(), [0.5, 0.7])  # (0.2 + 0.4 + 0.9) / 3; 0.7


@pytest.mark.parametrize(
    ("solve", "wrong"),
    [
        (exact_transport, math.nan),
        (exact_transport, math.inf),
        (exact_transport, -math.inf),
        (tight_entropic, math.nan),
        pytest.param(tight_entropic, math.inf),
        (tight_entropic, -math.inf),
    ],
)
def test_a_cost_that_is_not_finite_leaves_its_window_unconverged_and_the_others_alone(
    solve: Solver, wrong: float
) -> None:
    cost = torch.rand(3, 3, 4, dtype=torch.float64)
    for columns in (4, 3):  # one solver each
        case = cost[:, :, :columns], masks([3] * 3, 3), masks([columns] * 3, columns)
        good = solve(*case)
        broken = case[0].clone()
        broken[1, 1, 2] = wrong
        bad = solve(broken, *case[1:])
        assert bad.converged.tolist() == [True, False, True]
        assert bad.distance.isnan().tolist() == [False, True, False]
        assert (bad.plan[1] == 0).all()
        assert_close(bad.plan[[0, 2]], good.plan[[0, 2]], atol=1e-8, rtol=0)


@solvers
def test_bf16_costs_are_solved_in_float64(solve: Solver) -> None:
    cost = torch.rand(3, 4, 6).bfloat16()
    transport = solve(cost, masks([4, 3, 2], 4), masks([6, 3, 5], 6))
    exact = solve(cost.double(), masks([4, 3, 2], 4), masks([6, 3, 5], 6))
    assert transport.plan.dtype == transport.distance.dtype == torch.bfloat16
    assert_close(transport.distance, exact.distance.bfloat16(), atol=0, rtol=0)
    assert_close(transport.plan, exact.plan.bfloat16(), atol=0, rtol=0)


@solvers
def test_a_plan_is_constant_and_the_cost_is_left_as_it_was(solve: Solver) -> None:
    cost = torch.rand(2, 3, 4, requires_grad=True)
    before = cost.detach().clone()
    transport = solve(cost, masks([3, 1], 3), masks([2, 4], 4))
    assert not transport.plan.requires_grad
    assert not transport.distance.requires_grad
    assert torch.equal(cost, before)


@pytest.mark.parametrize("solve", [exact_transport, entropic_transport], ids=["exact", "entropic"])
@pytest.mark.parametrize(("windows", "rows", "columns"), [(1, 5, 3), (1, 2, 3), (1, 4, 4), (1, 4, 1), (2, 4, 3)])
def test_masks_of_another_size_than_the_cost_are_refused(solve: Solver, windows: int, rows: int, columns: int) -> None:
    """By the function itself: outside the tests nothing checks its annotations."""
    masks_of = torch.ones(windows, rows, dtype=torch.bool), torch.ones(windows, columns, dtype=torch.bool)
    with pytest.raises(
        ValueError, match="1 windows, 4 student and 3 teacher tokens; the masks must have shapes"
    ) as raised:
        inspect.unwrap(solve)(torch.rand(1, 4, 3), *masks_of)
    assert str(raised.value).endswith(f"[1, 4] and [1, 3], not {[windows, rows]} and {[windows, columns]}.")


def test_a_mask_that_is_no_prefix_has_no_exact_distance() -> None:
    hole = torch.tensor([[True, False, True], [True, True, False]])
    transport = exact_transport(torch.rand(2, 3, 3), hole, masks([3, 3], 3))
    assert transport.converged.tolist() == [False, True]
    assert transport.distance.isnan().tolist() == [True, False]
