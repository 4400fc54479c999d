"""`studies/forks_and_numbers.py`: which numbers are compared, and how well distances rank their differences."""

import importlib.util
from pathlib import Path

import numpy
import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "studies" / "forks_and_numbers.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("window", "number"),
    [
        (["so", " ", "3", "6", ".", "5", " each"], "36.5"),
        (["so", " ", "2", "0", ".", "\n"], "20"),
        (["so", " ", "3", "6"], None),  # may be 365
        (["so", " ", "3", "6", "."], None),  # may be 36.5
        (["so", " ", "3", "6", ".", "5"], None),
        (["so", " it", " is"], None),
    ],
)
def test_a_number_that_may_be_cut_is_none(script, window, number):
    assert script.next_number(window) == number


def test_only_high_loss_places_with_both_numbers_are_compared(script):
    def place(group, ours, theirs):
        return {"group": group, "student_window": [ours], "teacher_window": [theirs]}

    places = [
        place("high", "8 a", "8.0 b"),
        place("high", "8 a", "9 a"),
        place("high", "8 a", "a"),
        place("low", "8 a", "9 a"),
    ]
    found = [(row, differs) for row, differs, _ in script.compared([{"rollout": 3, "places": places}])]
    assert found == [(3, False), (3, True)]


def test_the_area_by_hand(script):
    values, differs = numpy.array([1.0, 2.0, 2.0, 3.0]), numpy.array([False, False, True, True])
    assert script.area(values, differs) == pytest.approx(3.5 / 4)  # of four pairs three are in order, one is a tie
    assert numpy.isnan(script.area(values, numpy.ones(4, dtype=bool)))
