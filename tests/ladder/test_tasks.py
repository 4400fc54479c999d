"""The worked solutions: every step is true, careful ones do one operation and leaps two, whoever writes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
from made_gym import MAKERS, Metadata, gym

from ladder.tasks import LEAVING, STUDENT, TEACHER, WRITERS, Problem, Style, draw, problems, reduce_once, write_solution
from topd.evaluation.answers import verdict

__all__ = ["gym"]  # a fixture
pytestmark = pytest.mark.usefixtures("gym")


def made(task: str, count: int = 300) -> Iterator[tuple[Metadata, str]]:
    for seed in range(count):
        metadata = MAKERS[task](random.Random(seed))
        yield metadata, str(metadata.pop("answer"))


def always(yes: bool) -> Callable[[], bool]:
    return lambda: yes


def test_every_task_of_the_levels_has_a_writer_and_a_maker_here() -> None:
    from ladder.levels import LEVELS

    assert {task for level in LEVELS.values() for task in level.tasks} <= set(WRITERS)
    assert set(MAKERS) == set(WRITERS)


@pytest.mark.parametrize("task", WRITERS)
@pytest.mark.parametrize("careful", [True, False])
def test_the_last_number_of_a_solution_is_the_answer(task: str, careful: bool) -> None:
    for metadata, answer in made(task):
        last = list(WRITERS[task](metadata, always(careful)))[-1]
        numbers = re.findall(r"-?\d+", last)
        assert numbers[-2 if task == "gcd" else -1] == answer, (metadata, last)  # gcd ends with (answer, 0)


@pytest.mark.parametrize("task", WRITERS)
def test_every_equality_that_is_written_down_is_true(task: str) -> None:
    checked = 0
    for metadata, _ in made(task):
        for step in WRITERS[task](metadata, always(True)):
            for part in step.split(": ")[-1].split(LEAVING):
                sides = [side for side in part.split(" = ") if re.fullmatch(r"[-+*/()\d ]+", side)]
                if len(sides) > 1 and "," not in part:
                    assert len({eval(side) for side in sides}) == 1, (metadata, step)
                    checked += 1
    assert checked > 300


@pytest.mark.parametrize("task", WRITERS)
def test_leaps_are_shorter(task: str) -> None:
    both = [
        [sum(1 for _ in WRITERS[task](metadata, always(careful))) for careful in (True, False)]
        for metadata, _ in made(task)
    ]
    assert all(leaps <= careful for careful, leaps in both)
    assert sum(leaps for _, leaps in both) < 0.8 * sum(careful for careful, _ in both)


def test_a_leap_does_two_operations() -> None:
    metadata = {"expression": "5 + 3 * 4 - 2 - 1"}
    assert list(WRITERS["chain_sum"](metadata, always(False))) == ["we get 17 - 2 - 1", "we get 14"]
    assert next(WRITERS["chain_sum"](metadata, always(True))) == f"3 * 4 = 12{LEAVING}5 + 12 - 2 - 1"


def test_nested_parentheses_are_taken_away_together() -> None:
    terms = ["(", "(", "2", "+", "3", ")", ")", "*", "4"]
    assert reduce_once(terms) == "2 + 3 = 5"
    assert terms == ["5", "*", "4"]


def test_a_solution_in_both_styles_gives_the_answer_in_a_box() -> None:
    drawn = draw({name: {} for name in WRITERS}, 120, seed=0, held_out=False)
    assert {each.task for each in drawn} == set(WRITERS)
    rng = random.Random(0)
    length = {}
    for style in (TEACHER, STUDENT):
        written = [write_solution(each, style, rng) for each in drawn]
        assert all(verdict(text, each.answer, "integer").right for text, each in zip(written, drawn, strict=True))
        assert not any(LEAVING in text for text in written)
        length[style] = sum(map(len, written))
    assert length[STUDENT] < 0.8 * length[TEACHER]


def test_style_sets_the_share_of_leaps() -> None:
    problem = Problem("chain_sum", "", "6", {"expression": "1 + 2 + 3"})
    half = Style(leaps=0.5, wording=(1.0, 0.0, 0.0))
    rng = random.Random(0)
    leaps = sum("we get 6" in write_solution(problem, half, rng).split(" Then")[0] for _ in range(2000))
    assert 900 < leaps < 1100


def test_no_problem_is_both_trained_on_and_held_out() -> None:
    tasks: dict[str, dict[str, Any]] = {"chain_sum": {}, "gcd": {}}
    trained = draw(tasks, 300, seed=1, held_out=False)
    held_out = draw(tasks, 50, seed=2, held_out=True)
    assert not {each.prompt for each in trained} & {each.prompt for each in held_out}
    assert len({each.prompt for each in trained}) == 300
    assert draw(tasks, 50, seed=2, held_out=True) == held_out
    assert draw(tasks, 50, seed=3, held_out=True) != held_out


def test_a_task_that_has_too_few_problems_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAKERS, "gcd", lambda rng: {"numbers": [2, 4], "answer": 2})
    with pytest.raises(ValueError, match="different problems of 5 were found"):
        draw({"gcd": {}}, 5, seed=0, held_out=False)


def test_a_task_without_solutions_is_refused() -> None:
    with pytest.raises(ValueError, match="no worked solutions for sudoku; there are for chain_sum"):
        next(problems({"sudoku": {}}, seed=0))


def test_problems_come_from_all_tasks_in_turn() -> None:
    first = islice(problems({"gcd": {}, "products": {}}, seed=0), 4)
    assert [each.task for each in first] == ["gcd", "products", "gcd", "products"]
