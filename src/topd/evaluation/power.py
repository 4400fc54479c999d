"""How large a gain an evaluation can see, and how many problems a given gain needs.

For the mean difference over problems, both models with several samples of each: its variance has a part from problem to
problem, which only more problems make smaller, and a part from sampling, which more samples make smaller too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from topd.evaluation.accuracy import problem_differences
from topd.evaluation.statistics import Floats, table_of

FEWEST = 6
"""Problems without which no sign-flip test reaches p = 0.05."""


@dataclass(frozen=True)
class Power:
    """What a paired comparison as large as this one can see.

    Attributes:
        gain: the gain that is asked about, in units of accuracy (0.044 is 4.4 points).
        power: probability of seeing a gain (p < 0.05) if it is there.
        detectable: the smallest gain that is seen with that probability here.
        problems: needed for `gain`, with as many samples as here.
        problems_at_best: needed however many samples there are; None where one sample a problem does not tell.
    """

    gain: float
    power: float
    detectable: float
    problems: int
    problems_at_best: int | None


def power_of(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], *, gain: float, power: float = 0.8, alpha: float = 0.05
) -> Power:
    """From the spread that is seen in two models' results (not from the difference that is seen).

    Normal approximation with Guenther's (1981) correction for few problems. Problems are spread evenly over benchmarks.

    Args:
        a: a table [problem, sample] for each benchmark.
        b: the same for the other model, of the same problems.
        gain: above 0, in units of accuracy.
        power: wanted probability of seeing it.
        alpha: below which p is called seen.

    Raises:
        ValueError: the tables are not of the same problems.
    """
    differences = problem_differences(a, b)
    spread = float(np.mean([_variance(each) for each in differences]))
    sampled = [_sampling_variance(first) + _sampling_variance(second) for first, second in zip(a, b, strict=True)]
    z_alpha, z_power = ndtri([1 - alpha / 2, power])

    def needed(variance: float) -> int:
        problems = (z_alpha + z_power) ** 2 * variance / gain**2 + z_alpha**2 / 2
        return max(FEWEST, math.ceil(problems))

    mean_variance = sum(_variance(each) / len(each) for each in differences) / len(differences) ** 2
    at_best = None if math.isnan(sum(sampled)) else needed(max(0.0, spread - float(np.mean(sampled))))
    return Power(gain, power, float((z_alpha + z_power) * math.sqrt(mean_variance)), needed(spread), at_best)


def _variance(differences: Floats) -> float:
    return float(differences.var(ddof=1)) if len(differences) > 1 else 0.0


def _sampling_variance(right: ArrayLike) -> float:
    """Mean over problems of the variance that a mean over k samples has by sampling; NaN for one sample."""
    table = table_of(right, "right")
    k = table.shape[1]
    return float(table.var(axis=1, ddof=1).mean() / k) if k > 1 else math.nan
