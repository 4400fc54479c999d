"""The figures of a study: by hand, beside scipy, and how often the interval covers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp, wilcoxon

from topd.evaluation.statistics import sign_flip_p
from topd.study.summary import crossed_interval, print_tables, study_rows, summarise


def test_a_summary_by_hand():
    right = {"opd": {0: [1, 0, 0, 0], 1: [1, 1, 0, 0]}, "topd": {0: [1, 1, 0, 0], 1: [1, 1, 1, 0], 2: [0, 0, 0, 0]}}
    found = summarise(right)
    assert found["opd"]["accuracy"]["by_seed"] == [0.25, 0.5]
    beside = found["topd"]["beside_opd"]
    assert (beside["mean"], beside["seeds"], beside["ahead"]) == (0.25, [0, 1], 2)
    assert beside["p"] == 0.5  # two seeds: 2 of 4 sign assignments are as far from 0
    assert "beside_opd" not in found["opd"]


def p_of(differences):
    return sign_flip_p(np.asarray(differences), 20_000, np.random.default_rng(0))


def test_the_sign_test_is_exact():
    assert p_of([0.1] * 10) == pytest.approx(2 / 1024)
    assert p_of([0.0] * 5) == p_of([0.3]) == 1.0
    ranks = np.array([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])  # on ranks it is Wilcoxon's signed-rank test
    assert p_of(ranks) == pytest.approx(wilcoxon(ranks, method="exact").pvalue)
    many = np.random.default_rng(0).normal(0.3, 1.0, 40)
    assert p_of(many) == pytest.approx(wilcoxon(many).pvalue, abs=0.1)


def coverage(studies, seeds, *, of_seeds, of_problems, of_rest, problems=150):
    """How often the interval holds the mean of differences made of a seed's, a problem's and their own part."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(studies):
        parts = [(of_seeds, (seeds, 1)), (of_problems, (1, problems)), (of_rest, (seeds, problems))]
        low, high = crossed_interval(0.2 + sum(rng.normal(0, spread, shape) for spread, shape in parts))
        hits += low <= 0.2 <= high
    return hits / studies


def test_the_interval_covers_the_mean_of_seeds_and_problems():
    assert 0.91 <= coverage(400, 10, of_seeds=0.02, of_problems=0.1, of_rest=0.3) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("of_seeds", "of_problems"), [(0.02, 0.1), (0.01, 0.05), (0.05, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_coverage_of_the_interval_in_2000_studies(seeds, of_seeds, of_problems):
    found = coverage(2000, seeds, of_seeds=of_seeds, of_problems=of_problems, of_rest=0.3)
    print(f"{seeds} seeds, spread of seeds {of_seeds}, of problems {of_problems}: {found:.1%}")
    assert 0.93 <= found <= (0.975 if of_seeds or of_problems else 0.99)


def test_the_interval_of_one_seed_is_students():
    table = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]])
    assert crossed_interval(table) == pytest.approx(ttest_1samp(table[0], 0).confidence_interval(0.95))
    assert crossed_interval(np.ones((1, 4))) == crossed_interval(np.ones((3, 4))) == (1.0, 1.0)


def test_an_interval_without_any_spread_is_not_shown_as_zero_to_zero():
    arms = summarise({"opd": {0: [0, 0, 0], 1: [0, 0, 0]}, "topd": {0: [0, 0, 0], 1: [0, 0, 0]}})
    result = {"arms": {name: {"greedy": arm, "seconds_training": {"0": 1.0}} for name, arm in arms.items()}}
    rows = {row[0]: row[1:3] for row in study_rows(result, "greedy")}
    assert rows == {"opd": ["0.0% (all alike)", ""], "topd": ["0.0% (all alike)", "+0.0 (all alike)"]}


@pytest.mark.parametrize("name", ["topd [lr]", "topd [/b]", "topd \x1b[31m"])
def test_the_name_of_an_arm_is_printed_as_it_is(name, capsys):
    found = summarise({"opd": {0: [0, 1]}, name: {0: [1, 1]}})
    arms = {arm: {"greedy": each, "sampled": each, "seconds_training": {"0": 1.0}} for arm, each in found.items()}
    print_tables({"arms": arms, "plan": {"held_out": 2}})
    assert capsys.readouterr().out.count(name.replace("\x1b", "\u241b")) == 2
