"""Accuracy on one benchmark or the mean over several: intervals, pass@k, majority, and two models on the same problems.

Tables are [problem, sample] of 0 and 1 (or [problem] of values from 0 to 1, such as pass@k). A list of tables is a list
of benchmarks, and the figure is the mean of their means, as in the paper's Table 1.

The unit that is drawn anew is the problem, together with its samples. That holds both levels of chance: a problem's
mean over k samples varies by which problem it is and by how its samples fell. Drawing the samples once more inside each
drawn problem would count the second twice (97.5 % coverage for a nominal 95 %, tests/evaluation/test_accuracy.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

from topd.evaluation.statistics import (
    Floats,
    Interval,
    PairedDifference,
    percentiles,
    resampled_means,
    sign_flip_p,
    table_of,
)


def accuracy_interval(
    benchmarks: Sequence[ArrayLike], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of the benchmarks' means, with the interval of Rubin's (1981) Bayesian bootstrap over problems.

    It starts from one right and one wrong problem (a share of each, where there are several benchmarks), our choice:
    for one sample a problem the interval is then that of a proportion under a uniform prior, which few problems, or
    problems that are nearly all right, do not make too narrow. Coverage in simulated studies of 30 problems and more:
    94 to 97 %, where a percentile interval has 90 to 96 (docs/evaluation.md).

    Args:
        benchmarks: a table each; they are drawn apart from each other.
        samples: draws.
        level: probability inside the interval.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: a table is empty, ragged or not finite.
    """
    rng = np.random.default_rng(seed)
    means = [table_of(table, "accuracy").mean(axis=1) for table in benchmarks]
    drawn = np.zeros(samples)
    for each in means:
        drawn += _posterior_means(each, 1 / len(means), samples, rng) / len(means)
    mean = _mean(means)
    low, high = percentiles(drawn, level)
    return Interval(mean, min(low, mean), max(high, mean), sum(map(len, means)))


def accuracy_difference(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Mean of a - b over benchmarks, with a bootstrap interval over problems, and a sign-flip permutation test.

    With few problems a percentile interval is too narrow, as the normal interval is beside Student's; it is widened as
    Hesterberg proposes (2015, "What teachers should know about the bootstrap", section 5).

    Args:
        a: a table for each benchmark.
        b: the same benchmarks with the same problems in the same order; the numbers of samples may differ.
        samples: bootstrap resamples, and sign assignments.
        level: share of resampled means inside the interval.
        seed: the same seed gives the same result.

    Raises:
        ValueError: the benchmarks or problems are not the same in number, or a table cannot be used.
    """
    differences = problem_differences(a, b)
    bootstrap, permutation = np.random.default_rng(seed).spawn(2)
    drawn = sum(resampled_means(each, samples, bootstrap) for each in differences) / len(differences)
    n = sum(map(len, differences))
    low, high = percentiles(np.asarray(drawn), _widened(level, n))
    weighted = np.concatenate([each / len(each) for each in differences])
    p = sign_flip_p(weighted, samples, permutation)
    return PairedDifference(_mean(differences), low, high, p, n)


def problem_differences(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> list[Floats]:
    """For each benchmark, [problem] differences of the means over samples.

    Raises:
        ValueError: the benchmarks or problems are not the same in number, or a table cannot be used.
    """
    first, second = ([table_of(table, name).mean(axis=1) for table in side] for name, side in (("a", a), ("b", b)))
    if [len(each) for each in first] != [len(each) for each in second]:
        raise ValueError(
            f"a has {[len(each) for each in first]} problems and b has {[len(each) for each in second]}: a comparison "
            "needs the same benchmarks with the same problems in the same order."
        )
    return [one - other for one, other in zip(first, second, strict=True)]


def sampling_error(right: ArrayLike) -> float | None:
    """Standard error of the accuracy on just these problems: what another draw of samples would change.

    None for one sample a problem, which does not tell.
    """
    table = table_of(right, "right")
    problems, k = table.shape
    if k == 1:
        return None
    return math.sqrt(table.var(axis=1, ddof=1).sum() / k) / problems


def pass_at_k(right: ArrayLike, k: int) -> Floats:
    """[problem] probability that at least one of k samples is right, without bias.

    1 - C(n - c, k) / C(n, k) for c right ones among n (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Raises:
        ValueError: k is below 1, or above the number of samples.
    """
    table = table_of(right, "right")
    n = table.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, there are {n}. Sample more.")
    wrong = n - table.sum(axis=1).astype(int)
    return np.array([1 - math.comb(int(count), k) / math.comb(n, k) for count in wrong])


def majority_value(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Probability that the most frequent answer to one problem is right: 0, 1, or the share of a tie that is.

    Args:
        answers: [sample] as extracted, None where there is none (it has no vote). Right ones count as one answer
            however they are written; wrong ones are told apart by how they are written.
        right: [sample]
    """
    votes = Counter(
        True if is_right else answer
        for answer, is_right in zip(answers, right, strict=True)
        if is_right or answer is not None
    )
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return winners.count(True) / len(winners) if winners else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several comparisons (Holm 1979): below 0.05, all such claims together err in 5 % at most."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _posterior_means(values: Floats, prior: float, samples: int, rng: np.random.Generator) -> Floats:
    """[samples] means of [problem] values under Dirichlet weights; a 0 and a 1 weigh `prior` beforehand."""
    distinct, place = np.unique(np.concatenate([values, [0.0, 1.0]]), return_inverse=True)
    weight = np.bincount(place, np.concatenate([np.ones(len(values)), [prior, prior]]))
    return np.asarray(rng.dirichlet(weight, size=samples) @ distinct)


def _widened(level: float, n: int) -> float:
    """The level that makes a percentile interval of n values as wide as Student's."""
    if n < 2:
        return level
    distance = math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)
    return float(2 * ndtr(distance) - 1)


def _mean(tables: Sequence[Floats]) -> float:
    return float(np.mean([table.mean() for table in tables]))
