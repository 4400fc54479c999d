"""The embedded task: arithmetic with precedence, modulo 100, worked out step by step in words.

A generator of problems like the paper's example ("What is 5+(2×3)?", Fig. 1 and 3). Two things vary on purpose:

* **wording** ("then" or "next", "=" or "makes"), which does not affect later tokens: a high token loss here is a false
  alarm;
* **procedure**: multiplication first, or from left to right. Where precedence matters, the two lead to different
  results: a fork.

An example solution::

    what is 5+2×3? first 2×3=6, leaving 5+6. then 5+6=11. so the answer is 11

There are two levels. "short" has 2 to 4 operations and responses of about 60 tokens; "long" has 6 to 8 operations, one
or two pairs of brackets and responses of about 145 tokens.

Problems are drawn by seed. A hash of its text decides whether a problem is held out, so training and held-out problems
are disjoint for all seeds.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from itertools import chain
from typing import Literal

MODULUS = 100
OPERATORS = ("+", "-", "×")

Level = Literal["short", "long"]

DATA: dict[str, Level] = {"embedded": "short", "embedded-long": "long"}
"""Names of the task's problems, as data or as a benchmark, in every command."""

PHRASES = {
    "opener": (" first ", " to begin ", " start with "),
    "connective": (" then ", " next ", " after that ", " and "),
    "equals": ("=", " is ", " makes "),
    "rest": (", leaving ", ", so we have ", ", which gives "),
    "closer": (" so the answer is ", " the result is ", " that makes the answer "),
}
Weights = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """The wording and the order of steps of solutions."""

    weights: Weights  # for each slot of `PHRASES`, the probability of each phrase
    # probability, at each step where precedence matters, of taking the leftmost operator instead
    left_to_right: float = 0.0


_TEACHER_WORDING: Weights = dict.fromkeys(PHRASES, (0.7, 0.2, 0.1)) | {"connective": (0.7, 0.2, 0.08, 0.02)}
_STUDENT_WORDING: Weights = dict.fromkeys(PHRASES, (0.2, 0.2, 0.6)) | {"connective": (0.1, 0.2, 0.2, 0.5)}
TEACHER = Style(_TEACHER_WORDING)
STUDENTS = {"easy": Style(_STUDENT_WORDING, 0.70), "standard": Style(_STUDENT_WORDING, 0.90)}
"""Student styles. With a stronger habit, the student takes the right path less often."""

OTHER_WORDING = 0.15
"""Share of the long student's phrases with the short students' wording; the rest has the teacher's."""
LONG_STUDENT = Style(
    {
        slot: tuple(
            (1 - OTHER_WORDING) * teacher + OTHER_WORDING * student
            for teacher, student in zip(_TEACHER_WORDING[slot], _STUDENT_WORDING[slot], strict=True)
        )
        for slot in PHRASES
    },
    left_to_right=0.85,
)


@dataclass(frozen=True)
class Problem:
    """An expression such as `5+(2-3)×4`, evaluated with precedence, modulo 100."""

    expression: str

    @property
    def prompt(self) -> str:
        return f"what is {self.expression}?"

    @property
    def terms(self) -> list[str]:
        """Numbers, operators and brackets, in order."""
        return re.findall(r"\d+|[-+×()]", self.expression)

    @property
    def level(self) -> Level:
        return "short" if sum(self.expression.count(operator) for operator in OPERATORS) <= 4 else "long"

    @property
    def answer(self) -> str:
        terms = self.terms
        while len(terms) > 1:
            evaluate_operator(terms, next_operator(terms))
        return terms[0]

    @property
    def held_out(self) -> bool:
        """Whether a problem is in the tenth of all problems, chosen by a hash of the text, that is never trained on."""
        return hashlib.sha256(self.expression.encode()).digest()[0] % 10 == 0


def next_operator(terms: list[str], *, left_to_right: bool = False) -> int:
    """Index of the operator to evaluate next: in the first innermost brackets, the first "×", else the first operator.

    `left_to_right`: always the first operator.
    """
    end = terms.index(")") if ")" in terms else len(terms)
    start = max((index for index in range(end) if terms[index] == "("), default=-1) + 1
    inside = range(start, end)
    times = [] if left_to_right else [index for index in inside if terms[index] == "×"]
    return times[0] if times else next(index for index in inside if terms[index] in OPERATORS)


def evaluate_operator(terms: list[str], index: int) -> str:
    """Replace an operator and its numbers by the result, drop brackets around a single number; return the result."""
    a, b = int(terms[index - 1]), int(terms[index + 1])
    result = str({"+": a + b, "-": a - b, "×": a * b}[terms[index]] % MODULUS)
    terms[index - 1 : index + 2] = [result]
    if terms[index - 2 : index - 1] == ["("] and terms[index : index + 1] == [")"]:
        terms[index - 2 : index + 1] = [result]
    return result


def write_solution(problem: Problem, style: Style, rng: random.Random) -> str:
    """One worked solution in the given style, from the space after the question mark to the answer."""

    def phrase(slot: str) -> str:
        return rng.choices(PHRASES[slot], style.weights[slot])[0]

    terms = problem.terms
    text, slot = "", "opener"
    while len(terms) > 1:
        index = next_operator(terms, left_to_right=rng.random() < style.left_to_right)
        step = "".join(terms[index - 1 : index + 2])
        text += f"{phrase(slot)}{step}{phrase('equals')}{evaluate_operator(terms, index)}"
        if len(terms) > 1:
            text += f"{phrase('rest')}{''.join(terms)}"
        text, slot = text + ".", "connective"
    return f"{text}{phrase('closer')}{terms[0]}"


_PROMPT = re.compile(r"what is (\(*[1-9](?:\)*[+×-]\(*[1-9]){2,8}\)*)\?")


def read_problem(prompt: str) -> Problem | None:
    """The problem in a prompt; None if it is not of this task."""
    match = _PROMPT.fullmatch(prompt)
    if match is None or match[1].count("(") != match[1].count(")"):
        return None
    problem = Problem(match[1])
    try:
        int(problem.answer)
    except (ValueError, IndexError, StopIteration):  # brackets that do not match
        return None
    return problem


_ANSWER = re.compile(r"(?:answer is|result is|makes the answer) (\d{1,2})\s*$")


def extract_answer(text: str) -> str | None:
    """The answer at the end of a solution; None if there is none (truncated, or not concluded)."""
    match = _ANSWER.search(text)
    return match.group(1) if match else None


def is_correct(text: str, answer: str) -> bool:
    """Whether the solution ends with the right answer. A solution without an answer is wrong."""
    return extract_answer(text) == answer


def sample_problem(rng: random.Random, level: Level = "short") -> Problem:
    short = level == "short"
    operations = rng.choices((2, 3, 4), (0.2, 0.4, 0.4))[0] if short else rng.randint(6, 8)
    numbers = [str(rng.randint(1, 9)) for _ in range(operations + 1)]
    operators = [rng.choice(OPERATORS) for _ in range(operations)]
    terms = [numbers[0], *chain(*zip(operators, numbers[1:], strict=True))]
    return Problem("".join(terms if short else _with_brackets(terms, rng)))


def _with_brackets(terms: list[str], rng: random.Random) -> list[str]:
    """One pair of brackets around two or three numbers in each half, or in one of the halves."""
    count = len(terms) // 2 + 1
    halves = [(0, count // 2), (count // 2, count)]
    if rng.random() < 0.5:
        halves = [rng.choice(halves)]
    for start, end in halves:
        inside = rng.randint(2, min(3, end - start))
        first = rng.randint(start, end - inside)
        terms[2 * first] = "(" + terms[2 * first]
        terms[2 * (first + inside - 1)] += ")"
    return terms


def make_problems(n: int, seed: int, *, held_out: bool, level: Level = "short") -> list[Problem]:
    """`n` different problems, held out or not, reproducible by seed."""
    rng = random.Random(f"topd-demo-{seed}" if level == "short" else f"topd-demo-{level}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < n:
        problem = sample_problem(rng, level)
        if problem.held_out == held_out:
            problems[problem.expression] = problem
    return list(problems.values())
