"""Statistics: textbook values, coverage by simulation, small cases by enumeration, properties."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd.evaluation import statistics
from topd.evaluation.statistics import Interval, PairedDifference, bootstrap_mean, paired_difference

binary = st.lists(st.integers(0, 1), min_size=1, max_size=40)
numbers = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=1, max_size=60)
pairs = st.integers(1, 50).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-3, 3), min_size=n, max_size=n) for _ in range(2)])
)


def all_resamples(values: list[float]) -> list[float]:
    return [float(np.mean(chosen)) for chosen in itertools.product(values, repeat=len(values))]


def exact_sign_flip(difference: list[float]) -> float:
    observed = abs(sum(difference))
    sums = [
        sum(s * d for s, d in zip(signs, difference, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(difference))
    ]
    return sum(abs(value) >= observed - 1e-12 for value in sums) / len(sums)


# --- intervals -------------------------------------------------------------------------------------------------------


def test_proportion_agrees_with_the_textbook() -> None:
    """320 of 400 right: 0.8 with the normal interval 0.8 +- 1.96 sqrt(0.8 * 0.2 / 400) = 0.761 to 0.839."""
    found = bootstrap_mean([1] * 320 + [0] * 80)
    assert (found.mean, found.n) == (0.8, 400)
    assert found.low == pytest.approx(0.7608, abs=0.004)
    assert found.high == pytest.approx(0.8392, abs=0.004)


def test_mean_of_many_numbers_agrees_with_the_textbook() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    half = 1.96 * values.std() / math.sqrt(len(values))
    found = bootstrap_mean(values)
    assert found.low == pytest.approx(values.mean() - half, abs=0.012)
    assert found.high == pytest.approx(values.mean() + half, abs=0.012)


@pytest.mark.parametrize("values", [[0, 0, 1], [0, 1, 1, 5], [1, 2, 4, 8, 16]])
def test_small_cases_equal_enumeration(values: list[float]) -> None:
    """Quantiles of all n^n resamples, where they do not fall on a step."""
    exact = np.quantile(all_resamples(values), [0.12, 0.88])
    found = bootstrap_mean(values, samples=40_000, level=0.76)
    assert [found.low, found.high] == pytest.approx(exact)


def test_drawing_counts_and_drawing_problems_are_one_law(monkeypatch: pytest.MonkeyPatch) -> None:
    values, other = [0, 1, 1, 3] * 10, [1, 0, 0, 1] * 10
    by_counts = bootstrap_mean(values, samples=40_000), paired_difference(values, other, samples=40_000)
    monkeypatch.setattr(statistics, "_FEW", 0)
    one_by_one = bootstrap_mean(values, samples=40_000), paired_difference(values, other, samples=40_000)
    for counted, drawn in zip(by_counts, one_by_one, strict=True):
        assert (counted.low, counted.high) == pytest.approx((drawn.low, drawn.high), abs=0.03)
    assert by_counts[1].p == pytest.approx(one_by_one[1].p, abs=0.01)


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["binary", "numbers"])
def test_coverage(spread: float) -> None:
    """Of 400 experiments with 80 problems, about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(400):
        values = (rng.random(80) < 0.7) + spread * rng.normal(size=80)
        found = bootstrap_mean(values, samples=1000, seed=seed)
        held += found.low <= 0.7 <= found.high
    assert 0.91 <= held / 400 <= 0.985


def test_a_problem_is_drawn_with_its_answers() -> None:
    """Four answers each: as wide as the normal interval of the problems' means, no wider."""
    answers = (np.random.default_rng(2).random((400, 4)) < np.random.default_rng(3).beta(2, 1, size=(400, 1))).astype(
        float
    )
    half = 1.96 * answers.mean(axis=1).std() / math.sqrt(400)
    found = bootstrap_mean(answers)
    assert (found.high - found.low) / (2 * half) == pytest.approx(1, abs=0.03)


def test_one_answer_each_is_one_level() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert bootstrap_mean([[value] for value in values]) == bootstrap_mean(values)


@given(binary | numbers, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_interval_properties(values: list[float], seed: int) -> None:
    """Ordered, inside the values, the same for the same seed and any order of problems."""
    found = bootstrap_mean(values, samples=300, seed=seed)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.mean == pytest.approx(np.mean(values))
    assert bootstrap_mean(values, samples=300, seed=seed) == found
    turned = bootstrap_mean(values[::-1], samples=300, seed=seed)
    assert (turned.low, turned.high) == (found.low, found.high)


@given(binary, st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_a_higher_level_is_wider(values: list[int], factor: int) -> None:
    narrow, wide = (bootstrap_mean(values, samples=400, level=level) for level in (1 - 0.1 * factor, 1 - 0.05 * factor))
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


def test_all_alike_has_no_width() -> None:
    assert bootstrap_mean([1, 1, 1]) == Interval(1.0, 1.0, 1.0, 3)
    assert bootstrap_mean([0.25]) == Interval(0.25, 0.25, 0.25, 1)


# --- paired difference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [[1, 1, 1, 1, 1], [1, 1, -1, 0, 1, 1], [0.3, 0.1, -0.2, 0.7], list(range(1, 9))])
def test_p_equals_enumeration(difference: list[float]) -> None:
    found = paired_difference(difference, [0] * len(difference), samples=40_000)
    assert found.p == pytest.approx(exact_sign_flip(difference), abs=0.01)


def test_p_of_many_different_sizes_equals_enumeration() -> None:
    """More than 32 sizes: signs are drawn one by one. The law of the sum is normal then."""
    difference = np.random.default_rng(5).normal(0.25, 1.0, 60)
    z = abs(difference.sum()) / math.sqrt((difference**2).sum())
    assert paired_difference(difference, 0 * difference).p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)


def test_p_of_right_and_wrong_is_the_sign_test() -> None:
    """12 problems better, 3 worse, 20 equal: 2 P(Binomial(15, 1/2) >= 12) = 0.0352."""
    a = [1] * 12 + [0] * 3 + [1] * 20
    b = [0] * 12 + [1] * 3 + [1] * 20
    found = paired_difference(a, b, samples=100_000)
    assert found.p == pytest.approx(0.03516, abs=0.003)
    assert found.mean == pytest.approx(9 / 35)
    assert found.low < 9 / 35 < found.high


def test_no_difference_at_all() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]) == PairedDifference(0.0, 0.0, 0.0, 1.0, 3)


def test_p_is_never_zero() -> None:
    assert paired_difference([1] * 200, [0] * 200, samples=999).p == 1 / 1000


def test_p_is_right_under_the_null() -> None:
    """Arms that do not differ get p <= 0.1 in about a tenth of experiments."""
    rng = np.random.default_rng(6)
    low = [paired_difference(*rng.normal(size=(2, 50)), samples=400, seed=seed).p <= 0.1 for seed in range(300)]
    assert 0.06 <= np.mean(low) <= 0.15


def test_samples_are_averaged_first() -> None:
    a, b = [[1, 0], [1, 1], [0, 0]], [0.5, 0.0, 0.0]
    assert paired_difference(a, b) == paired_difference([0.5, 1.0, 0.0], b)


@given(pairs, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_exchanging_the_arms(ab: tuple[list[int], list[int]], seed: int) -> None:
    a, b = ab
    one, other = paired_difference(a, b, samples=300, seed=seed), paired_difference(b, a, samples=300, seed=seed)
    assert one.p == other.p
    assert one.mean == pytest.approx(-other.mean)
    assert 1 / 301 <= one.p <= 1
    assert one.low <= one.high


@given(pairs)
@settings(max_examples=40, deadline=None)
def test_what_both_arms_share_does_not_matter(ab: tuple[list[int], list[int]]) -> None:
    a, b = np.array(ab)
    shift = np.arange(len(a)) * 7
    assert paired_difference(a + shift, b + shift, samples=200) == paired_difference(a, b, samples=200)


# --- size, errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [np.arange(2000.0), np.arange(8000.0).reshape(2000, 4)], ids=["one", "two levels"])
def test_large_inputs_stay_small_in_memory(values: np.ndarray) -> None:
    tracemalloc.start()
    bootstrap_mean(values, samples=10_000)
    if values.ndim == 1:
        paired_difference(values, values[::-1], samples=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "empty"),
        ([[], []], "empty"),
        ([1.0, float("nan")], "NaN"),
        ([[1, 0], [1]], "equally many"),
        (["right"], "numbers"),
        (np.zeros((2, 2, 2)), "3 dimensions"),
        (1.0, "0 dimensions"),
    ],
)
def test_bad_values_say_what_to_do(values: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bootstrap_mean(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says):
        paired_difference([1.0], values)  # type: ignore[arg-type]


def test_different_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 problems and b has 3"):
        paired_difference([1, 0], [1, 0, 1])
