"""Accuracy on benchmarks: intervals, pass@k, majority, the difference of two models, and the power of a comparison.

Tables are [problem, sample] of 0 and 1 (or [problem] of values from 0 to 1, such as pass@k). A list of tables is a list
of benchmarks, and the figure is the mean of their means, as in the paper's Table 1.

Intervals resample problems, each together with its samples. That covers both sources of variance: a problem's mean over
k samples varies with the problem and with its samples. Resampling the samples inside each problem as well would count
the second source twice (97.5 % coverage for a nominal 95 %, tests/evaluation/test_accuracy.py).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri, stdtrit

from topd.evaluation.statistics import (
    Floats,
    Interval,
    PairedDifference,
    percentiles,
    problem_differences,
    resampled_means,
    sign_flip_p,
    table_of,
)


def accuracy_interval(
    benchmarks: Sequence[ArrayLike], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of the benchmarks' means, with the interval of Rubin's (1981) Bayesian bootstrap over problems.

    The prior is one right and one wrong problem, shared by all benchmarks (our choice). With one sample per problem the
    interval is that of a proportion under a uniform prior, which is not too narrow for few problems or accuracies near
    0 or 1. Coverage in simulated studies of 30 problems and more: 94 to 97 %, compared with 90 to 96 % for a percentile
    interval (docs/evaluation.md).

    `benchmarks`: a table each; they are resampled independently. Raises `ValueError` for a table that is empty, ragged
    or not finite.
    """
    rng = np.random.default_rng(seed)
    means = [table_of(table, "accuracy").mean(axis=1) for table in benchmarks]
    prior, drawn = 1 / len(means), np.zeros(samples)
    for values in means:
        distinct, place = np.unique(np.concatenate([values, [0.0, 1.0]]), return_inverse=True)
        weight = np.bincount(place, np.concatenate([np.ones(len(values)), [prior, prior]]))
        drawn += rng.dirichlet(weight, size=samples) @ distinct / len(means)
    mean = float(np.mean([values.mean() for values in means]))
    low, high = percentiles(drawn, level)
    return Interval(mean, min(low, mean), max(high, mean), sum(map(len, means)))


def accuracy_difference(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Mean of a - b over benchmarks, with a bootstrap interval over problems, and a sign-flip permutation test.

    With few problems a percentile interval is too narrow, like a normal interval compared with Student's t. It is
    widened as in Hesterberg (2015, "What teachers should know about the bootstrap", section 5).

    `a`: a table per benchmark. `b`: the same benchmarks with the same problems in the same order; the numbers of
    samples may differ. Raises `ValueError` for other numbers of benchmarks or problems.
    """
    differences = problem_differences(a, b)
    bootstrap, permutation = np.random.default_rng(seed).spawn(2)
    drawn = sum(resampled_means(each, samples, bootstrap) for each in differences) / len(differences)
    n = sum(map(len, differences))
    if n > 1:  # the level at which a percentile interval of n values is as wide as Student's
        level = float(2 * ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)) - 1)
    low, high = percentiles(np.asarray(drawn), level)
    weighted = np.concatenate([each / len(each) for each in differences])
    p = sign_flip_p(weighted, samples, permutation)
    return PairedDifference(float(np.mean([each.mean() for each in differences])), low, high, p, n)


def sampling_error(right: ArrayLike) -> float | None:
    """Standard error of the accuracy on these problems due to sampling; None with one sample per problem."""
    table = table_of(right, "right")
    problems, k = table.shape
    return math.sqrt(table.var(axis=1, ddof=1).sum() / k) / problems if k > 1 else None


def pass_at_k(right: ArrayLike, k: int) -> Floats:
    """[problem] unbiased probability that at least one of k samples is right.

    1 - C(n - c, k) / C(n, k) for c right ones among n (Chen et al. 2021, arXiv:2107.03374, equation 1).
    """
    table = table_of(right, "right")
    n = table.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, there are {n}. Sample more.")
    wrong = n - table.sum(axis=1).astype(int)
    return np.array([1 - math.comb(int(count), k) / math.comb(n, k) for count in wrong])


def majority_value(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Probability that the most frequent answer to one problem is right: 0, 1, or a share for a tie.

    `answers`: [sample] as extracted; None has no vote. All right answers count as one answer; wrong answers are
    distinguished by their text. `right`: [sample]
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
    """Adjusted p-values (Holm 1979): claims with a value below 0.05 contain an error with at most 5 % probability."""
    order, adjusted = np.argsort(p_values), np.empty(len(p_values))
    factors = len(p_values) - np.arange(len(p_values))
    adjusted[order] = np.maximum.accumulate(factors * np.asarray(p_values)[order]).clip(max=1.0)
    return adjusted.tolist()


FEWEST = 6
"""Smallest number of problems with which a sign-flip test can reach p = 0.05."""


@dataclass(frozen=True)
class Power:
    """The gain that a paired comparison of this size can detect.

    Attributes:
        gain: in question, in units of accuracy (0.044 is 4.4 points).
        power: probability of detecting a gain (p < 0.05) if it exists.
        detectable: the smallest gain that is detected with that probability here.
        problems: number needed for `gain`, with as many samples as here.
        problems_at_best: number needed with unlimited samples; None with one sample per problem.
    """

    gain: float
    power: float
    detectable: float | None
    problems: int | None
    problems_at_best: int | None


def power_of(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], *, gain: float, power: float = 0.8, alpha: float = 0.05
) -> Power:
    """Power of a comparison, from the spread of two models' results (not from their difference).

    The difference varies from problem to problem, which only more problems reduce, and by sampling, which more samples
    reduce too. Normal approximation with Guenther's (1981) correction for few problems; problems are spread evenly over
    benchmarks.

    `a`, `b`: as in `accuracy_difference`. `gain`: above 0, in units of accuracy. `power`: wanted probability of
    detecting it. `alpha`: significance level.
    """
    differences = problem_differences(a, b)
    variances = [float(each.var(ddof=1)) if len(each) > 1 else 0.0 for each in differences]
    spread = float(np.mean(variances))
    sampled = [_sampling_variance(first) + _sampling_variance(second) for first, second in zip(a, b, strict=True)]
    z_alpha, z_power = ndtri([1 - alpha / 2, power])

    if spread == 0:  # such as two models that solve nothing: the results say nothing about the spread
        return Power(gain, power, None, None, None)

    def needed(variance: float) -> int:
        problems = (z_alpha + z_power) ** 2 * variance / gain**2 + z_alpha**2 / 2
        return max(FEWEST, math.ceil(problems))

    of_mean = sum(each / len(found) for each, found in zip(variances, differences, strict=True)) / len(differences) ** 2
    at_best = None if math.isnan(sum(sampled)) else needed(max(0.0, spread - float(np.mean(sampled))))
    return Power(gain, power, float((z_alpha + z_power) * math.sqrt(of_mean)), needed(spread), at_best)


def _sampling_variance(right: ArrayLike) -> float:
    """Mean over problems of the sampling variance of a mean over k samples; NaN for one sample."""
    table = table_of(right, "right")
    k = table.shape[1]
    return float(table.var(axis=1, ddof=1).mean() / k) if k > 1 else math.nan
