"""Accuracy: coverage in simulated studies, pass@k and majority by enumeration, Holm's steps, paired models."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from topd.evaluation.accuracy import (
    accuracy_difference,
    accuracy_interval,
    holm,
    majority_value,
    pass_at_k,
    sampling_error,
)
from topd.evaluation.statistics import paired_difference

EASY, MIDDLE, HARD, SPLIT = (3, 0.3), (2, 1), (0.2, 2), (0.5, 0.5)
"""Beta laws of how likely a problem is answered right: means 0.91, 0.67, 0.09, 0.5 (either known or not)."""


def study(rng: np.random.Generator, law: tuple[float, float], problems: int, k: int) -> np.ndarray:
    """[problem, sample] of a benchmark whose problems were drawn from the law."""
    return (rng.random((problems, k)) < rng.beta(*law, problems)[:, None]).astype(float)


def coverage(law: tuple[float, float], sizes: list[int], k: int, studies: int, samples: int = 600) -> float:
    """Share of studies whose interval holds the law's mean."""
    rng, truth = np.random.default_rng([sum(sizes), k]), law[0] / sum(law)
    held = 0
    for seed in range(studies):
        found = accuracy_interval([study(rng, law, n, k) for n in sizes], samples=samples, seed=seed)
        held += found.low - 1e-9 <= truth <= found.high + 1e-9
    return held / studies


@pytest.mark.parametrize(("sizes", "studies"), [([30], 2000), ([30, 30, 30], 1000)], ids=["one benchmark", "the mean"])
@pytest.mark.parametrize("law", [MIDDLE, EASY], ids=["middle", "easy"])
def test_intervals_of_the_papers_size_hold_the_truth_in_95_of_100_studies(
    sizes: list[int], studies: int, law: tuple[float, float]
) -> None:
    """30 problems, five samples each: the paper's evaluation."""
    assert 0.93 <= coverage(law, sizes, k=5, studies=studies) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("law", [EASY, MIDDLE, HARD, SPLIT])
@pytest.mark.parametrize(
    ("sizes", "k"), [([30], 1), ([30], 16), ([90], 5), ([200], 4), ([30, 30, 30], 5), ([30, 500], 4)]
)
def test_coverage_everywhere(law: tuple[float, float], sizes: list[int], k: int) -> None:
    assert 0.93 <= coverage(law, sizes, k, studies=2000, samples=2000) <= 0.97


def test_drawing_samples_inside_drawn_problems_would_count_their_noise_twice() -> None:
    """Why problems are drawn with their samples: nested draws hold the truth in over 97 of 100 studies."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        right = study(rng, MIDDLE, 90, 5)
        problems = rng.integers(90, size=(300, 90))
        nested = rng.binomial(5, right.mean(axis=1)[problems]).mean(axis=1) / 5
        low, high = np.quantile(nested, [0.025, 0.975])
        held += low <= 2 / 3 <= high
    assert held / 600 > 0.965


@pytest.mark.parametrize("right", [0, 3, 15, 27, 30])
def test_one_sample_each_is_the_textbooks_interval_of_a_proportion(right: int) -> None:
    """Uniform prior: Beta(right + 1, wrong + 1). All right: 0.025^(1/31) = 0.888, and up to 1."""
    found = accuracy_interval([[1] * right + [0] * (30 - right)], samples=100_000)
    low, high = beta.ppf([0.025, 0.975], right + 1, 31 - right)
    assert found.low == pytest.approx(min(low, right / 30), abs=0.002)
    assert found.high == pytest.approx(max(high, right / 30), abs=0.002)


def test_the_mean_of_benchmarks_weighs_them_alike() -> None:
    found = accuracy_interval([np.ones((10, 2)), np.zeros((1000, 3))])
    assert (found.mean, found.n) == (0.5, 1010)


def test_many_problems_agree_with_the_textbook() -> None:
    """320 of 400 right: the normal interval is 0.761 to 0.839."""
    found = accuracy_interval([[1] * 320 + [0] * 80])
    assert (found.low, found.high) == (pytest.approx(0.7608, abs=0.006), pytest.approx(0.8392, abs=0.006))


def test_sampling_error_is_the_spread_of_other_draws() -> None:
    rng = np.random.default_rng(1)
    chance = rng.beta(0.5, 0.5, 30)
    draws = [(rng.random((30, 5)) < chance[:, None]).astype(float) for _ in range(2000)]
    spread = np.std([draw.mean() for draw in draws])
    assert np.mean([sampling_error(draw) ** 2 for draw in draws]) ** 0.5 == pytest.approx(spread, rel=0.06)  # type: ignore[operator]
    assert sampling_error(draws[0][:, :1]) is None


# --- two models ------------------------------------------------------------------------------------------------------


def test_the_difference_of_one_benchmark_is_the_paired_difference() -> None:
    rng = np.random.default_rng(2)
    a, b = study(rng, EASY, 800, 4), study(rng, MIDDLE, 800, 4)
    ours, known = accuracy_difference([a], [b]), paired_difference(a, b)
    assert (ours.mean, ours.n) == (pytest.approx(known.mean), 800)
    assert (ours.low, ours.high) == (pytest.approx(known.low, abs=0.003), pytest.approx(known.high, abs=0.003))


@pytest.mark.parametrize(("sizes", "k"), [([30], 5), ([30, 30, 30], 5), ([90], 1)])
def test_differences_hold_the_truth_and_p_keeps_its_promise(sizes: list[int], k: int) -> None:
    """Two models that are equally good on the whole, though not on each problem; 1,000 studies."""
    rng = np.random.default_rng(k)
    held = below = 0
    for seed in range(1000):
        a, b = [], []
        for n in sizes:
            chance = rng.beta(2, 1, n)
            a.append(rng.random((n, k)) < chance[:, None])
            b.append(rng.random((n, k)) < rng.beta(8 * chance + 1e-3, 8 * (1 - chance) + 1e-3)[:, None])
        found = accuracy_difference(a, b, samples=500, seed=seed)
        held += found.low - 1e-9 <= 0 <= found.high + 1e-9
        below += found.p <= 0.05
    assert 0.93 <= held / 1000 <= 0.97
    assert 0.02 <= below / 1000 <= 0.07


def test_few_problems_widen_the_interval_as_student_does() -> None:
    difference = np.random.default_rng(4).normal(size=8)
    found = accuracy_difference([difference], [np.zeros(8)], samples=60_000)
    plain = paired_difference(difference, np.zeros(8), samples=60_000)
    student_beside_normal = 2.3646 / 1.96 * math.sqrt(8 / 7)
    assert (found.high - found.low) / (plain.high - plain.low) == pytest.approx(student_beside_normal, rel=0.06)


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 and 3 problems and b has 2 and 2"):
        accuracy_difference([[1, 0], [1, 0, 1]], [[1, 0], [1, 0]])


# --- pass@k, majority, Holm ------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[list[int]], k: int) -> None:
    subsets = [[max(chosen) for chosen in itertools.combinations(row, k)] for row in right]
    assert pass_at_k(right, k) == pytest.approx([sum(row) / len(row) for row in subsets])


def test_pass_at_k_of_the_textbook() -> None:
    """200 samples, 13 right, k = 10: 1 - C(187, 10) / C(200, 10)."""
    expected = 1 - math.prod(Fraction(187 - i, 200 - i) for i in range(10))
    assert pass_at_k([[1] * 13 + [0] * 187], 10)[0] == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="needs at least 3 samples"):
        pass_at_k([[1, 0]], 3)


@pytest.mark.parametrize(
    ("answers", "right", "value"),
    [
        (["5", "5", "7"], [True, True, False], 1.0),
        (["5", "7", "7"], [True, False, False], 0.0),
        (["1/2", "0.5", "7", "7", "8"], [True, True, False, False, False], 0.5),  # two ways to write the right one
        (["5", None, None], [True, False, False], 1.0),  # no vote without an answer
        ([None, None], [False, False], 0.0),
        (["5", "7", "8"], [True, False, False], 1 / 3),
    ],
)
def test_majority(answers: list[str | None], right: list[bool], value: float) -> None:
    assert majority_value(answers, right) == pytest.approx(value)


def test_holm_of_the_textbook() -> None:
    """p = 0.01, 0.04, 0.03, 0.005 of four: 4 x 0.005, 3 x 0.01, 2 x 0.03, and the last no less than that."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
