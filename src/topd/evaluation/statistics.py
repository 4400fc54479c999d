"""Intervals and tests of mean scores: bootstrap over problems, and a paired permutation test.

The unit is the problem: a benchmark is a sample of the problems that could have been used. Nothing assumes a normal
distribution, and every number is reproducible from a seed. `samples` are bootstrap resamples and sign assignments,
`level` is the share of resampled means inside an interval. scipy's bootstrap draws every problem of every resample;
here values that occur often (right or wrong) are drawn as multinomial counts, which follow the same law: 10,000
resamples of 2,000 problems take milliseconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK = 4_000_000
"""Values in memory at once while resampling (32 MB of float64)."""
_FEW = 32
"""With up to this many different values, counts are drawn instead of problems. Both follow the same law."""

EXACT_UP_TO = 12
"""Differences up to which a permutation test tries every assignment of signs. Our choice: 4,096 take milliseconds."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` problems and its interval, in the units of the values."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over `n` problems with its interval, and the two-sided p-value of "no difference"."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def bootstrap_mean(values: ArrayLike, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean and its percentile bootstrap interval.

    `values`: [problem], 0/1 or any numbers. Or [problem, sample], several answers per problem: a problem is drawn
    together with its answers, which covers both sources of variance (see `accuracy`). The order of problems does not
    matter. Raises `ValueError` for values that are empty, ragged or not finite.
    """
    table = table_of(values, "values")
    means = resampled_means(table.mean(axis=1), samples, np.random.default_rng(seed))
    return Interval(float(table.mean()), *percentiles(means, level), len(table))


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Mean of a - b on the same problems, its percentile bootstrap interval, and a sign-flip permutation test.

    The test: if the two arms do not differ, both signs of each problem's difference are equally likely. See
    `sign_flip_p`.

    `a`: [problem], or [problem, sample]; each problem's answers are averaged first. `b`: the same problems, in the same
    order, but not necessarily as many answers. Exchanging a and b gives the same p. Raises `ValueError` for other
    numbers of problems, and as `bootstrap_mean`.
    """
    (difference,) = problem_differences([a], [b])
    bootstrap, permutation = np.random.default_rng(seed).spawn(2)
    low, high = percentiles(resampled_means(difference, samples, bootstrap), level)
    p = sign_flip_p(difference, samples, permutation)
    return PairedDifference(float(difference.mean()), low, high, p, len(difference))


def problem_differences(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> list[Floats]:
    """For each benchmark, [problem] differences of the means over samples; `ValueError` for other problems in `b`."""
    first, second = ([table_of(table, name).mean(axis=1) for table in side] for name, side in (("a", a), ("b", b)))
    if list(map(len, first)) != list(map(len, second)):
        counts = (" and ".join(str(len(each)) for each in side) for side in (first, second))
        raise ValueError(
            "a has {} problems and b has {}: a comparison needs the same benchmarks with the same problems in the same "
            "order. Keep those that both answered.".format(*counts)
        )
    return [one - other for one, other in zip(first, second, strict=True)]


def resampled_means(values: Floats, samples: int, rng: np.random.Generator) -> Floats:
    """[samples] means of resamples of [problem] values."""
    n = len(values)
    distinct, count = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:
        return rng.multinomial(n, count / n, size=samples) @ distinct / n
    ordered = np.sort(values)
    return _in_chunks(samples, n, lambda size: ordered[rng.integers(n, size=(size, n))].mean(axis=1))


def sign_flip_p(differences: Floats, samples: int, rng: np.random.Generator) -> float:
    """Two-sided sign-flip permutation p-value of the sum of differences: the share of sign assignments at least as far
    from 0. All are tried for up to `EXACT_UP_TO` differences; else p is (count + 1) / (samples + 1) of random ones."""
    if len(differences) == 1:
        return 1.0
    if len(differences) <= EXACT_UP_TO:
        from scipy.stats import permutation_test

        every = permutation_test(
            (differences,), np.sum, permutation_type="samples", vectorized=True, n_resamples=np.inf
        )
        return float(every.pvalue)
    size = np.sort(np.abs(differences[differences != 0]))
    distinct, count = np.unique(size, return_counts=True)
    if len(distinct) <= _FEW:  # the signs of c equal sizes add up to 2 Binomial(c, 1/2) - c
        sums = (2 * rng.binomial(count, 0.5, size=(samples, len(count))) - count) @ distinct
    else:
        sums = _in_chunks(
            samples, len(size), lambda draws: (2.0 * rng.integers(2, size=(draws, len(size)), dtype=np.int8) - 1) @ size
        )
    tolerance = 1e-9 * size.sum()  # so that equal sums stay equal whatever the order of summation
    extreme = int((np.abs(sums) >= abs(differences.sum()) - tolerance).sum())
    return (extreme + 1) / (samples + 1)


def _in_chunks(samples: int, width: int, draw: Callable[[int], Floats]) -> Floats:
    """[samples] results of `draw(size) -> [size]`, each call of which needs `size * width` values in memory."""
    size = max(1, _CHUNK // width)
    return np.concatenate([draw(min(size, samples - start)) for start in range(0, samples, size)])


def percentiles(means: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def table_of(values: ArrayLike, name: str) -> Floats:
    """[problem, sample] float64; [problem] values get one sample each."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be numbers, [problem] or [problem, sample] with equally many samples of each problem "
            f"({error}). Average each problem's samples first if their numbers differ."
        ) from error
    if table.ndim not in (1, 2):
        raise ValueError(f"{name} must be [problem] or [problem, sample], got {table.ndim} dimensions. Reshape it.")
    if table.size == 0:
        raise ValueError(f"{name} is empty: there is nothing to average. Evaluate at least one problem.")
    if not np.isfinite(table).all():
        raise ValueError(
            f"{name} contains NaN or infinity. Count a missing answer as wrong (0), or leave the problem out."
        )
    return table[:, None] if table.ndim == 1 else table
