"""The rule of lm-evaluation-harness's AIME tasks: where an answer is taken from, and when two are the same string."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from topd.evaluation.answers import Verdict, given_answer, normalised, same_text, verdict


@pytest.mark.parametrize(
    ("text", "answer", "marked"),
    [
        (r"so $x = 5$, and \boxed{204}.", "204", True),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed 7$ is it, not \boxed{8}", "7", True),  # a box without braces goes first
        (r"\boxed{8} or \boxed 7$ is it", "7", True),
        (r"first $2$, then $x=3$", "2$, then $x=3", True),  # from the first dollar sign to the last
        (r"\boxed{12", r"\boxed{12", False),  # not closed, no dollar signs: the whole text
        (r"$5$ \boxed{12", "5", True),
        (r"\fbox{7} or $8$", "8", True),  # no box to the harness
        ("the answer is 5", "the answer is 5", False),
        ("costs $5", "costs $5", False),
        (r"\boxed{3} Question: what is next? \boxed{4}", "3", True),  # generation would have ended there
        (r"\boxed{3}<|im_end|>\boxed{4}", "3", True),
    ],
)
def test_where_the_answer_is_taken_from(text: str, answer: str, marked: bool) -> None:
    assert given_answer(text) == (answer, marked)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (".25", "0.25", True),
        ("x = 5", "5", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"90^\circ", "90", True),
        (r"5\text{ cm}", "5", True),
        (r"\left(1, 2\right)", "(1,2)", True),
        (r"50\%", "50", True),
        ("025", "25", False),  # strings, not numbers
        ("-1/2", r"-\frac{1}{2}", False),
        ("2/4", "1/2", False),
        ("1,000", "1000", False),
        ("204.", "204", False),
        ("x/2", r"\frac{x}{2}", False),
        ("x/2", "x/2", True),  # it cannot be normalised, and is compared as it is
    ],
)
def test_which_answers_are_the_same_string(one: str, other: str, same: bool) -> None:
    assert same_text(one, other) is same


@pytest.mark.parametrize("text", [r"\sqrt", r"\frac", r"1\text{ m}2\text{ m}", "x/2"])
def test_what_cannot_be_normalised_says_so(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        normalised(text)


def test_a_verdict_counts_an_answer_without_a_mark_as_unread_unless_it_is_right() -> None:
    assert verdict(r"\boxed{7}", "7", "lm_eval") == Verdict("7", True, True)
    assert verdict(r"\boxed{7}", "8", "lm_eval") == Verdict("7", False, True)
    assert verdict("I think 7", "7", "lm_eval") == Verdict(None, False, False)
    assert verdict("7", "7", "lm_eval") == Verdict("7", True, True)


def test_it_refuses_three_quarters_of_the_hard_answers_that_are_right() -> None:
    """The same cases as for our own rule, which refuses four right ones."""
    file = Path(__file__).with_name("hard_answers.tsv")
    found = []
    for case in csv.DictReader(file.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE):
        text = case["given"] if case["kind"] == "unclosed" else rf"so \boxed{{{case['given']}}}."
        found.append((case["right"] == "yes", verdict(text, case["wanted"], "lm_eval").right))
    print(f"{found.count((True, False))} of {sum(right for right, _ in found)} right ones are refused, "
          f"{found.count((False, True))} of {sum(not right for right, _ in found)} wrong ones pass")  # fmt: skip
    assert found.count((False, True)) == 0
    assert found.count((True, False)) == 126
