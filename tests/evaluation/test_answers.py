"""Verdicts: the last box, exact whole numbers, mathematical equality in a process that can be killed."""

from __future__ import annotations

import csv
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from topd.errors import TOPDError
from topd.evaluation import equivalence
from topd.evaluation.answers import Rule, Verdict, last_boxed, verdict


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{204}.", "204"),
        (r"first \boxed{2}. No: $\boxed{3}$", "3"),
        (r"\boxed{ \frac{1}{2} } is it", r"\frac{1}{2}"),
        (r"\boxed{1} and $\boxed{2}$, \boxed{3}", "1, 2, 3"),
        (r"\boxed{1}, \text{ or } \boxed{2}", "1, 2"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{12} but then \boxed{34", None),  # cut inside its answer
        (r"\boxed{34 \boxed{12}", "12"),
        (r"\boxed{34", None),
        (r"\boxed{}", None),
        (r"\boxed{5} goes into \boxed{}.", "5"),
        (r"the set { of \boxed{6}", "6"),
        (r"\boxed{1 \} 2}", r"1 \} 2"),
        ("the answer is 5", None),
    ],
)
def test_the_last_closed_box_is_the_answer(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize("piece", [r"\boxed{", r"{\boxed{1}", "}", r"\boxed{1} and "])
def test_a_response_that_repeats_itself_is_read_in_no_time(piece: str) -> None:
    started = time.process_time()
    last_boxed(piece * 20_000)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "box",
    [
        "73",
        "073",
        "73^\\circ",
        "$73$",
        r"\text{73}",
        "73.",
        " +73 ",
        "m+n = 73",
        "x=73",
        "1{,}000 - 927 = 73",
        r"\textbf{73}",
        r"\mathbf{73.00}",
        r"\boldsymbol{73}",
        r"\displaystyle 73",
        "73.0",
        r"73\text{ cm}^2",
    ],
)
def test_whole_numbers_in_other_clothes_are_right(box: str) -> None:
    assert verdict(rf"\boxed{{{box}}}", "073", "integer") == Verdict(box.strip(), True, True)


@pytest.mark.parametrize("rule", ["integer", "math"])
def test_a_space_command_before_the_closing_brace(rule: Rule) -> None:
    assert verdict(r"\boxed{3\ }", "3", rule).right


@pytest.mark.parametrize("box", ["1,234", r"1{,}234", r"1\,234", r"1,\! 234"])
def test_thousands_separators(box: str) -> None:
    assert verdict(rf"\boxed{{{box}}}", "1234", "integer").right


@pytest.mark.parametrize(
    "box",
    [
        "73.5",
        "73.05",
        "73 = m",
        "a = 73, b = 73",
        "x = 73 or 73",
        r"\text{not } 73",
        "7,3",
        "7 3",
        r"\frac{73}{1}",
        "about 73",
        "9" * 400,
    ],
)
def test_what_is_no_whole_number_is_unparsed_not_wrong(box: str) -> None:
    assert verdict(rf"\boxed{{{box}}}", "73", "integer") == Verdict(box, False, False)


def test_a_wrong_number_is_wrong_and_parsed() -> None:
    assert verdict(r"\boxed{74}", "73", "integer") == Verdict("74", False, True)


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("0.5", r"\frac12"),
        (r"\dfrac{2}{4}", r"\frac{1}{2}"),
        (r"x \in [-2, 7]", "[-2,7]"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        ("3,4", "4,3"),
        (r"5.4", r"5.4 \text{ cents}"),
        (r"\text{evelyn}", r"\text{Evelyn}"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x = 34", "34"),
        (r"10\,080", "10080"),
        (r"2\,512\ 003", "2512003"),
        ("145°", r"145^\circ"),
        ("90", "90°"),
        ("0.0000672", "6.72e-05"),
        ("1e6", "1000000"),
    ],
)
def test_equal_mathematics_is_right(box: str, answer: str) -> None:
    assert verdict(rf"thus \boxed{{{box}}}", answer, "math") == Verdict(box, True, True)


@pytest.mark.parametrize(
    ("box", "answer"),
    [("(4,3)", "(3,4)"), ("0.33", r"\frac13"), ("2", "3"), (r"\pi", "3.14"), (r"1\,23", "123"), ("2e", "2e1")],
)
def test_other_mathematics_is_wrong(box: str, answer: str) -> None:
    assert verdict(rf"\boxed{{{box}}}", answer, "math") == Verdict(box, False, True)


HARD = Path(__file__).with_name("hard_answers.tsv")
MISJUDGED = {
    (r"\frac{1}{3}", "0.3333333333"): "right",  # compared to six digits
    (r"\frac{1}{3}", r"0.\overline{3}"): "wrong",
    (r"\sin 30^\circ", r"\frac{1}{2}"): "wrong",  # a degree sign is dropped
    (r"\frac12", r"\cos 60^\circ"): "wrong",
    ("-i", r"\frac{1}{i}"): "wrong",
}
"""What math-verify is known to get wrong of the hard cases."""


def test_how_often_hard_answers_are_misjudged() -> None:
    """Fractions, surds, intervals, units, several answers, tiny numbers and more, each right or wrong by hand.

    Kind "integer" is judged by that rule, and "unclosed" is a whole response.
    """
    cases = list(csv.DictReader(HARD.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
    found = {}
    for case in cases:
        text = case["given"] if case["kind"] == "unclosed" else rf"so \boxed{{{case['given']}}}."
        right = verdict(text, case["wanted"], "integer" if case["kind"] == "integer" else "math").right
        if right != (case["right"] == "yes"):
            found[case["wanted"], case["given"]] = "right" if right else "wrong"
    truly = sum(case["right"] == "yes" for case in cases)
    false = list(found.values())
    print(
        f"{len(cases)} hard cases: {len(found)} misjudged ({len(found) / len(cases):.1%}); {false.count('right')} of "
        f"{len(cases) - truly} wrong answers pass, {false.count('wrong')} of {truly} right ones do not"
    )
    assert len(cases) >= 200
    assert found == MISJUDGED


def test_no_box_is_unparsed() -> None:
    assert verdict("the answer is 5", "5", "math") == Verdict(None, False, False)


def test_the_embedded_task_has_its_own_ending() -> None:
    assert verdict(" first 2×3=6. so the answer is 11", "11", "embedded") == Verdict("11", True, True)
    assert verdict(" first 2×3=6. so the answer is 12", "11", "embedded") == Verdict("12", False, True)
    assert verdict(" first 2×3=6, leaving", "11", "embedded") == Verdict(None, False, False)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("7 * 9 = 63\n#### 63", "63", Verdict("63", True, True)),
        ("#### $1,234 in all", "1234.0", Verdict("1,234", True, True)),
        ("#### 12\nWait.\n#### 13", "12", Verdict("13", False, True)),
        ("#### -0.50", "-0.5", Verdict("-0.50", True, True)),
        ("The answer is 63.", "63", Verdict(None, False, False)),
        ("#### many", "63", Verdict(None, False, False)),
        ("#### 63", "63 apples", Verdict("63", False, True)),
        (r"#### \$18", "18", Verdict("18", True, True)),
        ("#### .5 litres", "0.5", Verdict(".5", True, True)),
        ("#### 1/2", "1", Verdict("1/2", False, True)),
        ("#### 1/2", "0.5", Verdict("1/2", True, True)),
        ("#### 1/0", "63 apples", Verdict("1/0", False, False)),
    ],
)
def test_the_number_behind_the_last_hashes_is_gsm8k_s_answer(text: str, answer: str, expected: Verdict) -> None:
    assert verdict(text, answer, "gsm8k") == expected


def test_an_answer_that_cannot_be_compared_in_time_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From another thread, past a loop inside C: the process is killed, the next answer gets a new one."""
    assert verdict(r"\boxed{\frac24}", "0.5", "math").right  # the process is there
    monkeypatch.setattr(equivalence, "HARD_SECONDS", 0.5)
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(verdict(r"\boxed{9^{9^{9}}}", "4", "math")))
    thread.start()
    thread.join(timeout=60)
    assert found == [Verdict("9^{9^{9}}", False, False)]
    assert equivalence._process(os.getpid())._child is None
    monkeypatch.undo()
    assert verdict(r"\boxed{\frac24}", "0.5", "math").right


def test_many_threads_share_one_process() -> None:
    found: list[bool] = []
    answers = [(rf"\boxed{{\frac{{{n}}}{{7}}}}", rf"\frac{{{n * 3}}}{{21}}") for n in range(1, 9)]
    threads = [
        threading.Thread(target=lambda pair=pair: found.append(verdict(*pair, "math").right)) for pair in answers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_without_math_verify_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    equivalence._process.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(TOPDError, match="pip install 'math-verify"):
        verdict(r"\boxed{\frac24}", "0.5", "math")
