"""The embedded task: arithmetic with precedence, modulo 100, worked out step by step in words.

The paper's own example ("What is 5+(2×3)?", Fig. 1 and 3) made a generator. Two things vary, on purpose:

* **wording**, which changes nothing that follows ("then" or "next", "=" or "makes"): a high token loss here is a
  false alarm;
* **procedure**: multiplication first, or from left to right. Where precedence matters the two part for good: a fork.

A solution reads::

    what is 5+2×3? first 2×3=6, leaving 5+6. then 5+6=11. so the answer is 11

Problems come from a seed. A problem belongs to the held-out part if a hash of its text says so, so train and held-out
problems are disjoint by construction, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

MODULUS = 100
OPERATORS = ("+", "-", "×")

PHRASES = {
    "opener": (" first ", " to begin ", " start with "),
    "connective": (" then ", " next ", " after that ", " and "),
    "equals": ("=", " is ", " makes "),
    "rest": (", leaving ", ", so we have ", ", which gives "),
    "closer": (" so the answer is ", " the result is ", " that makes the answer "),
}


@dataclass(frozen=True)
class Style:
    """How a writer of solutions words and orders its steps.

    Attributes:
        weights: for each slot of `PHRASES`, the probability of each phrase.
        left_to_right: probability, at each step where precedence matters, of taking the leftmost operator instead.
    """

    weights: dict[str, tuple[float, ...]]
    left_to_right: float = 0.0


_TEACHER_WORDING = {
    "opener": (0.7, 0.2, 0.1),
    "connective": (0.7, 0.2, 0.08, 0.02),
    "equals": (0.7, 0.2, 0.1),
    "rest": (0.7, 0.2, 0.1),
    "closer": (0.7, 0.2, 0.1),
}
_STUDENT_WORDING = {
    "opener": (0.2, 0.2, 0.6),
    "connective": (0.1, 0.2, 0.2, 0.5),
    "equals": (0.2, 0.2, 0.6),
    "rest": (0.2, 0.2, 0.6),
    "closer": (0.2, 0.2, 0.6),
}
TEACHER = Style(_TEACHER_WORDING)
STUDENTS = {
    "easy": Style(_STUDENT_WORDING, left_to_right=0.70),
    "standard": Style(_STUDENT_WORDING, left_to_right=0.90),
    "hard": Style(_STUDENT_WORDING, left_to_right=0.97),
    "wording": Style(_STUDENT_WORDING, left_to_right=0.2),
    "stubborn": Style(_STUDENT_WORDING, left_to_right=0.97),
}
"""Student styles: the stronger the habit, the less often the right path is visited."""


@dataclass(frozen=True)
class Problem:
    """`numbers[0] operators[0] numbers[1] ...`, evaluated with precedence, modulo 100."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def expression(self) -> str:
        return write_expression(self.numbers, self.operators)

    @property
    def prompt(self) -> str:
        return f"what is {self.expression}?"

    @property
    def answer(self) -> str:
        numbers, operators = list(self.numbers), list(self.operators)
        while operators:
            reduce_at(numbers, operators, next_operator(operators))
        return str(numbers[0])

    @property
    def held_out(self) -> bool:
        """A tenth of all problems, chosen by a hash of the text, is never trained on."""
        return hashlib.sha256(self.expression.encode()).digest()[0] % 10 == 0


def write_expression(numbers: tuple[int, ...] | list[int], operators: tuple[str, ...] | list[str]) -> str:
    tail = "".join(f"{operator}{number}" for operator, number in zip(operators, numbers[1:], strict=True))
    return f"{numbers[0]}{tail}"


def next_operator(operators: list[str]) -> int:
    """Index of the operator that precedence evaluates next: the first "×", else the first."""
    return operators.index("×") if "×" in operators else 0


def reduce_at(numbers: list[int], operators: list[str], index: int) -> int:
    """Evaluate one operator in place; return the result."""
    a, b, operator = numbers[index], numbers[index + 1], operators.pop(index)
    result = {"+": a + b, "-": a - b, "×": a * b}[operator] % MODULUS
    numbers[index : index + 2] = [result]
    return result


def write_solution(problem: Problem, style: Style, rng: random.Random) -> str:
    """One worked solution in the given style, from the space after the question mark to the answer."""

    def phrase(slot: str) -> str:
        return rng.choices(PHRASES[slot], style.weights[slot])[0]

    numbers, operators = list(problem.numbers), list(problem.operators)
    text, slot = "", "opener"
    while operators:
        index = next_operator(operators)
        if rng.random() < style.left_to_right:
            index = 0
        step = write_expression(numbers[index : index + 2], operators[index : index + 1])
        result = reduce_at(numbers, operators, index)
        text += f"{phrase(slot)}{step}{phrase('equals')}{result}"
        if operators:
            text += f"{phrase('rest')}{write_expression(numbers, operators)}"
        text, slot = text + ".", "connective"
    return f"{text}{phrase('closer')}{numbers[0]}"


_PROMPT = re.compile(r"what is ([1-9](?:[+×-][1-9]){2,4})\?")


def read_problem(prompt: str) -> Problem | None:
    """The problem that a prompt asks; None if it is none of this task's."""
    match = _PROMPT.fullmatch(prompt)
    return Problem(tuple(map(int, match[1][::2])), tuple(match[1][1::2])) if match else None


_ANSWER = re.compile(r"(?:answer is|result is|makes the answer) (\d{1,2})\s*$")


def extract_answer(text: str) -> str | None:
    """The answer that a solution ends with, or None if it does not end with one (cut off, or never concluded)."""
    match = _ANSWER.search(text)
    return match.group(1) if match else None


def is_correct(text: str, answer: str) -> bool:
    """Whether the solution ends with the right answer. A solution without an answer is wrong."""
    return extract_answer(text) == answer


def sample_problem(rng: random.Random) -> Problem:
    count = rng.choices((2, 3, 4), (0.2, 0.4, 0.4))[0]
    numbers = tuple(rng.randint(1, 9) for _ in range(count + 1))
    return Problem(numbers, tuple(rng.choice(OPERATORS) for _ in range(count)))


def make_problems(n: int, seed: int, *, held_out: bool) -> list[Problem]:
    """`n` different problems of the wanted part, the same for the same seed."""
    rng = random.Random(f"topd-demo-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < n:
        problem = sample_problem(rng)
        if problem.held_out == held_out:
            problems[problem.expression] = problem
    return list(problems.values())
