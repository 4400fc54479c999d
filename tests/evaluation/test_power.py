"""Power: textbook sample sizes, and simulated studies of the size that the formula asks for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from made_evaluations import write_evaluation
from rich.console import Console

from topd.evaluation.accuracy import accuracy_difference, power_of
from topd.evaluation.compare import compare
from topd.evaluation.tables import comparison_tables


def spread_of(deviation: float, problems: int = 1000) -> np.ndarray:
    """[problem] differences of mean 0 with this standard deviation."""
    values = np.resize([-1.0, 1.0], problems)
    return deviation * values / values.std(ddof=1)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_of_the_textbook(effect: float, pairs: int) -> None:
    """A paired t-test at 5 %, two-sided, with 80 % power (Cohen's small, middle and large effect)."""
    found = power_of([spread_of(0.3)], [np.zeros(1000)], gain=0.3 * effect)
    assert found.problems == pytest.approx(pairs, abs=1)
    assert found.problems_at_best is None  # one sample a problem


def models(rng: np.random.Generator, problems: int, k: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """[problem, sample] of two models, the first better by `gain` on the whole."""
    chance = 0.2 + 0.5 * rng.random(problems)
    better = chance + gain + rng.normal(0, 0.1, problems)
    return rng.random((problems, k)) < better[:, None], rng.random((problems, k)) < chance[:, None]


@pytest.mark.parametrize(("k", "benchmarks"), [(1, 1), (5, 1), (5, 3)])
def test_studies_of_that_size_see_the_gain_in_four_of_five(k: int, benchmarks: int) -> None:
    rng = np.random.default_rng(k)
    gain = 0.1
    pilot = models(rng, 20_000, k, 0.0)
    each = power_of([pilot[0]] * benchmarks, [pilot[1]] * benchmarks, gain=gain).problems // benchmarks
    seen = 0
    for seed in range(500):
        sides = zip(*(models(rng, each, k, gain) for _ in range(benchmarks)), strict=True)
        seen += accuracy_difference(*sides, samples=400, seed=seed).p < 0.05
    assert 0.75 <= seen / 500 <= 0.86


def test_what_is_seen_here_needs_as_many_problems_as_there_are() -> None:
    rng = np.random.default_rng(0)
    a, b = models(rng, 400, 4, 0.1)
    here = power_of([a], [b], gain=0.044)
    there = power_of([a], [b], gain=here.detectable)
    assert there.problems == pytest.approx(400, abs=4)


def test_samples_help_only_against_the_noise_of_sampling() -> None:
    """True differences vary by 0.1 from problem to problem: (1.96 + 0.84)^2 0.01 / 0.05^2 + 1.96^2 / 2 = 34."""
    a, b = models(np.random.default_rng(1), 40_000, 4, 0.0)
    found = power_of([a], [b], gain=0.05)
    assert found.problems_at_best == pytest.approx(34, abs=6)
    assert found.problems > 5 * found.problems_at_best


def test_without_any_difference_nothing_is_known_about_power(tmp_path: Path) -> None:
    """Two models that solve nothing: no number of problems follows from that."""
    found = power_of([np.zeros((8, 2))], [np.zeros((8, 2))], gain=0.05)
    assert (found.detectable, found.problems, found.problems_at_best) == (None, None, None)
    for label in ("a", "b"):
        write_evaluation(tmp_path / label, "aime24", np.zeros((8, 2), dtype=bool))
    table = comparison_tables(compare([tmp_path / "a", tmp_path / "b"], tmp_path))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    (row,) = [line for line in text.splitlines() if line.startswith("aime24")]
    assert row.split()[1] == "+0.0"
    assert row.split()[-2:] == ["–", "–"]
