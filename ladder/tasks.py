"""Problems of reasoning-gym with worked solutions, written carefully or in leaps.

A careful step does one operation and writes it down; a leap does two at once and writes only what is left. Both are
valid, but a small model that leaps errs more often: not the step is wrong, the reader of it must be stronger. So here a
fork is a choice of procedure, and wording ("Then", "Next") varies besides, which changes nothing. ::

    Calculate 5 + 3 * 4 - 2.
    First 3 * 4 = 12, which leaves 5 + 12 - 2. Then 5 + 12 = 17, which leaves 17 - 2. Then ...     (careful)
    First we get 17 - 2. Then ...                                                                  (a leap)
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Careful = Callable[[], bool]
"""Asked at each choice: is the next step a careful one?"""

INSTRUCTION = "\nPut your final answer within \\boxed{}.\n"
PHRASES = {
    "opener": ("First ", "To begin, ", "We start: "),
    "connective": ("Then ", "Next, ", "After that, "),
    "leaving": (", which leaves ", ", so we have ", " and get "),
    "closer": ("So the answer is ", "The result is ", "That makes "),
}


@dataclass(frozen=True)
class Style:
    """How a writer of solutions works.

    Attributes:
        leaps: probability, at each choice, of a leap instead of a careful step.
        wording: probabilities of the phrases of every slot, in their order.
    """

    leaps: float
    wording: tuple[float, float, float]


TEACHER = Style(leaps=0.02, wording=(0.7, 0.2, 0.1))
STUDENT = Style(leaps=0.85, wording=(0.2, 0.2, 0.6))


@dataclass(frozen=True)
class Problem:
    """One entry of reasoning-gym.

    Attributes:
        task: its dataset.
        prompt: the question and where to put the answer.
        answer: a whole number, as text.
        metadata: what the dataset says about it; the solution is worked out from this.
    """

    task: str
    prompt: str
    answer: str
    metadata: dict[str, Any]

    @property
    def held_out(self) -> bool:
        """A tenth of all problems, chosen by a hash of the text, is never trained on."""
        return hashlib.sha256(self.prompt.encode()).digest()[0] % 10 == 0


def problems(tasks: dict[str, dict[str, Any]], seed: int) -> Iterator[Problem]:
    """Problems of all tasks in turn, without end, the same for the same seed; some come again.

    Args:
        tasks: by name of reasoning-gym's dataset, its settings.

    Raises:
        ValueError: a task that has no writer of solutions.
    """
    import reasoning_gym

    unknown = sorted(set(tasks) - set(WRITERS))
    if unknown:
        raise ValueError(f"There are no worked solutions for {unknown[0]}; there are for {', '.join(WRITERS)}.")
    # An entry is drawn from seed + index: seeds that are far apart share none.
    sets = {
        name: reasoning_gym.create_dataset(name, size=2**31, seed=seed * 10**8, **own) for name, own in tasks.items()
    }
    index = 0
    while True:
        for name, dataset in sets.items():
            entry = dataset[index]
            yield Problem(name, entry["question"].strip() + INSTRUCTION, entry["answer"], entry["metadata"])
        index += 1


def draw(tasks: dict[str, dict[str, Any]], count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """`count` different problems of the wanted part.

    Raises:
        ValueError: the tasks do not have so many.
    """
    found: dict[str, Problem] = {}
    for tried, problem in enumerate(problems(tasks, seed)):
        if len(found) == count:
            return list(found.values())
        if tried > 100 * (count + 100):
            raise ValueError(f"Only {len(found)} different problems of {count} were found; ask for fewer.")
        if problem.held_out == held_out:
            found.setdefault(problem.prompt, problem)
    raise AssertionError("problems() does not end")


def write_solution(problem: Problem, style: Style, rng: random.Random) -> str:
    """One worked solution in the given style; it ends with the boxed answer."""

    def phrase(slot: str) -> str:
        return rng.choices(PHRASES[slot], style.wording)[0]

    text, slot = "", "opener"
    for step in WRITERS[problem.task](problem.metadata, lambda: rng.random() >= style.leaps):
        text += phrase(slot) + step.replace(LEAVING, phrase("leaving")) + ". "
        slot = "connective"
    return f"{text}{phrase('closer')}\\boxed{{{problem.answer}}}."


LEAVING = "|"
"""Stands for one of the phrases of that name in a step."""


def expression_steps(metadata: dict[str, Any], careful: Careful) -> Iterator[str]:
    """Sums, differences, products and parentheses, by precedence."""
    terms = metadata["expression"].split()
    while len(terms) > 1:
        if careful():
            operation = reduce_once(terms)
            yield f"{operation}{LEAVING}{' '.join(terms)}" if len(terms) > 1 else operation
        else:
            for _ in range(2):
                if len(terms) > 1:
                    reduce_once(terms)
            yield f"we get {' '.join(terms)}"


def reduce_once(terms: list[str]) -> str:
    """Do the operation that comes next, in place; say it ("3 * 4 = 12")."""
    end = terms.index(")") if ")" in terms else len(terms)
    start = max((place for place in range(end) if terms[place] == "("), default=-1) + 1
    inside = terms[start:end]
    place = start + (inside.index("*") if "*" in inside else 1)
    left, operator, right = int(terms[place - 1]), terms[place], int(terms[place + 1])
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    terms[place - 1 : place + 2] = [str(result)]
    while start and terms[start - 1 : start + 2 : 2] == ["(", ")"]:
        terms[start - 1 : start + 2] = [str(result)]
        start -= 1
    return f"{left} {operator} {right} = {result}"


def gcd_steps(metadata: dict[str, Any], careful: Careful) -> Iterator[str]:
    """Euclid's algorithm: remainders, one at a time or two."""
    a, b = metadata["numbers"]
    while b:
        if careful():
            said = f"{a} = {a // b} * {b} + {a % b}{LEAVING}"
            a, b = b, a % b
        else:
            said = "we get "
            for _ in range(2):
                a, b = (b, a % b) if b else (a, b)
        yield f"{said}({a}, {b})"


def product_steps(metadata: dict[str, Any], careful: Careful) -> Iterator[str]:
    """A product of two numbers: tens and ones of the second apart, or at once."""
    a, b = map(int, metadata["expression"].split(" * "))
    tens, ones = b - b % 10, b % 10
    if not (tens and ones and careful()):
        yield f"{a} * {b} = {a * b}"
        return
    yield f"{a} * {b} = {a} * {tens} + {a} * {ones}"
    yield f"{a} * {tens} = {a * tens}"
    yield f"{a} * {ones} = {a * ones}"
    yield f"{a * tens} + {a * ones} = {a * b}"


def equation_steps(metadata: dict[str, Any], careful: Careful) -> Iterator[str]:
    """A linear equation in one unknown: the constant to the right, then the division; or at once."""
    x = metadata["variable"]
    left, right = metadata["equation"].split(" = ")
    value = int(right)
    constant = sum(int(found.replace(" ", "")) for found in re.findall(r"(?:^|[-+] ?)\d+(?![\d*])", left))
    found = re.search(rf"(-? ?)(?:(\d+)\*)?{x}", left)
    assert found, metadata["equation"]
    factor = int(f"{found[1].strip()}{found[2] or 1}")
    answer = (value - constant) // factor
    if careful():
        if constant:
            sign = "-" if constant > 0 else "+"
            yield f"{factor}*{x} = {value} {sign} {abs(constant)} = {value - constant}"
        yield f"{x} = {value - constant} / {factor} = {answer}"
    else:
        yield f"we get {x} = {answer}"


def leg_steps(metadata: dict[str, Any], careful: Careful) -> Iterator[str]:
    """Legs of animals, one kind at a time or two, with the total so far."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    left, total = list(metadata["animals"].items()), 0
    while left:
        kinds, left = (left[:1], left[1:]) if careful() else (left[:2], left[2:])
        legs = [count * ANIMALS[animal] for animal, count in kinds]
        before, total = total, total + sum(legs)
        if len(kinds) == 1:
            [(animal, count)] = kinds
            yield f"{animal}: {count} * {ANIMALS[animal]} = {legs[0]}{LEAVING}{before} + {legs[0]} = {total}"
        else:
            yield f"{' and '.join(animal for animal, _ in kinds)}: we get {total}"


WRITERS: dict[str, Callable[[dict[str, Any], Careful], Iterator[str]]] = {
    "chain_sum": expression_steps,
    "basic_arithmetic": expression_steps,
    "gcd": gcd_steps,
    "products": product_steps,
    "simple_equations": equation_steps,
    "leg_counting": leg_steps,
}
"""By dataset of reasoning-gym: the steps of a solution, without the words around them."""
