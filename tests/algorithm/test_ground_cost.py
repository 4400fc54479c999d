"""What moving a token costs: `ground_cost` and `token_cost`."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import ground_cost, token_cost

kinds = pytest.mark.parametrize("kind", ["cosine", "sqeuclidean"])
sizes, seeds = st.integers(0, 5), st.integers(0, 2**20)


def embeddings(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(*shape: int, vocabulary: int, seed: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def test_costs_worked_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[5.0, 0.0], [0.0, 1.0], [-3.0, -4.0]])
    # cosines: (2, 0) with each: 1, 0, -3/5; (3, 4) / 5 with each: 3/5, 4/5, -1
    assert_close(ground_cost(student, teacher).tolist(), [[0.0, 1.0, 1.6], [0.4, 0.2, 2.0]], atol=1e-6, rtol=0)
    # squares: 9 + 0, 4 + 1, 25 + 16; 4 + 16, 9 + 9, 36 + 64
    assert_close(ground_cost(student, teacher, "sqeuclidean").tolist(), [[9.0, 5.0, 41.0], [20.0, 18.0, 100.0]])


@kinds
@given(windows=st.integers(0, 3), rows=sizes, columns=sizes, width=st.integers(2, 4), seed=seeds)
def test_the_cost_is_that_of_the_oracle_and_of_scipy(
    kind: str, windows: int, rows: int, columns: int, width: int, seed: int
) -> None:
    student = embeddings(windows, rows, width, seed=seed)
    teacher = embeddings(windows, columns, width, seed=seed + 1)
    cost = ground_cost(student, teacher, kind)
    assert cost.shape == (windows, rows, columns)
    assert (cost >= 0).all()
    for window in range(windows):
        assert_close(cost[window], oracles.ground_cost(student[window], teacher[window], kind))
        if rows and columns:
            assert_close(cost[window], torch.from_numpy(cdist(student[window], teacher[window], kind)))
        assert_close(cost[window], ground_cost(student[window], teacher[window], kind))


@kinds
@given(rows=sizes, columns=sizes, seed=seeds)
def test_swapping_the_roles_transposes_the_cost(kind: str, rows: int, columns: int, seed: int) -> None:
    student, teacher = embeddings(rows, 3, seed=seed), embeddings(columns, 3, seed=seed + 1)
    assert_close(ground_cost(student, teacher, kind), ground_cost(teacher, student, kind).mT)


@kinds
def test_costs_are_never_negative_and_zero_between_equals_up_to_rounding(kind: str) -> None:
    points = embeddings(200, 3, seed=0, dtype=torch.float32)
    cost = ground_cost(points, points, kind)
    assert (cost >= 0).all()
    assert_close(cost.diagonal(), torch.zeros(200), atol=1e-5, rtol=0)


@given(factor=st.floats(0.01, 100), seed=seeds)
def test_the_cosine_cost_ignores_lengths_and_the_squared_one_does_not(factor: float, seed: int) -> None:
    student, teacher = embeddings(2, 3, seed=seed), embeddings(4, 3, seed=seed + 1)
    assert_close(ground_cost(factor * student, teacher), ground_cost(student, teacher))
    scaled = ground_cost(factor * student, factor * teacher, "sqeuclidean")
    assert_close(scaled, factor**2 * ground_cost(student, teacher, "sqeuclidean"))


def test_a_zero_embedding_has_cosine_zero_with_everything() -> None:
    cost = ground_cost(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert cost.tolist() == [[1.0, 1.0]]


@kinds
def test_an_embedding_that_is_not_a_number_costs_no_number(kind: str) -> None:
    student = embeddings(2, 3, seed=0)
    student[1, 0] = math.nan
    assert ground_cost(student, embeddings(4, 3, seed=1), kind).isnan().tolist() == [[False] * 4, [True] * 4]


@kinds
def test_bf16_embeddings_cost_about_the_same(kind: str) -> None:
    student = embeddings(3, 16, seed=0, dtype=torch.bfloat16)
    teacher = embeddings(5, 16, seed=1, dtype=torch.bfloat16)
    exact = ground_cost(student.double(), teacher.double(), kind)
    assert_close(ground_cost(student, teacher, kind).double(), exact, rtol=0.03, atol=0.03)


@kinds
@given(windows=st.integers(1, 3), rows=sizes, columns=sizes, seed=seeds)
def test_the_cost_of_tokens_is_the_cost_of_their_embeddings(
    kind: str, windows: int, rows: int, columns: int, seed: int
) -> None:
    table = embeddings(6, 3, seed=seed, dtype=torch.float32)
    student = tokens(windows, rows, vocabulary=6, seed=seed + 1)
    teacher = tokens(windows, columns, vocabulary=6, seed=seed + 2)
    cost = token_cost(student, teacher, table, kind)
    assert_close(cost, ground_cost(table[student], table[teacher], kind), atol=1e-5, rtol=1e-5)
    assert (cost[student[:, :, None] == teacher[:, None, :]] == 0).all()  # exactly, however rounding goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [5, 17, 33, 50])
@kinds
def test_in_a_window_equal_pairs_of_tokens_cost_exactly_the_same(kind: str, length: int, dtype: torch.dtype) -> None:
    table = embeddings(12, 64, seed=0, dtype=dtype)
    student, teacher = tokens(90, length, vocabulary=12, seed=1), tokens(90, length + 1, vocabulary=12, seed=2)
    cost = token_cost(student, teacher, table, kind)
    pairs = student[:, :, None] * 12 + teacher[:, None, :]
    for window in range(90):
        distinct = torch.stack([pairs[window].double(), cost[window].double()]).flatten(1).unique(dim=1)
        assert distinct.shape[1] == len(pairs[window].unique())


@kinds
def test_many_windows_cost_what_each_costs_alone(kind: str) -> None:
    table = embeddings(60, 512, seed=0, dtype=torch.float32)  # more windows than are gathered at once
    student, teacher = tokens(101, 9, vocabulary=60, seed=1), tokens(101, 7, vocabulary=60, seed=2)
    cost = token_cost(student, teacher, table, kind)
    for window in range(101):
        alone = token_cost(student[[window]], teacher[[window]], table, kind)
        assert_close(cost[[window]], alone, atol=1e-5, rtol=1e-5)


def test_equal_tokens_cost_exactly_nothing_even_without_an_embedding() -> None:
    table = torch.zeros(3, 2)
    cost = token_cost(torch.tensor([[0, 1]]), torch.tensor([[1, 0, 2]]), table)
    assert cost.tolist() == [[[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]]


@kinds
def test_token_costs_of_bf16_embeddings_are_computed_in_float32(kind: str) -> None:
    table = embeddings(50, 16, seed=0, dtype=torch.bfloat16)
    student, teacher = tokens(2, 5, vocabulary=50, seed=1), tokens(2, 7, vocabulary=50, seed=2)
    cost = token_cost(student, teacher, table, kind)
    assert cost.dtype == torch.float32
    exact = ground_cost(table.double()[student], table.double()[teacher], kind)
    assert_close(cost.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_batch_without_windows_costs_nothing() -> None:
    nothing = torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)
    assert token_cost(*nothing, torch.randn(5, 2)).shape == (0, 3, 4)
