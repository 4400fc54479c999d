"""Grade-school word problems of reasoning-gym's `gsm_symbolic`, with worked solutions in two wordings.

The teacher's solutions are the templates' own. The student's say the same steps in other words::

    In total there are 50 girls + 100 boys = 150 kids.          (teacher)
    Next, in total there are 50 girls plus 100 boys, which makes 150 kids.   (student)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Templates whose solutions are long (more than 330 characters), have a wrong or unexplained line, or end in "36.0".
EXCLUDED = frozenset({0, 2, 11, 13, 17, 21, 25, 27, 29, 36, 52, 60, 66, 68, 70, 73, 80, 82, 83, 84, 89, 92, 94, 96})
LARGEST = 100
"""Largest number in a solution: the models learn the steps of a problem, not long multiplication."""
UNSEEN = frozenset({6, 16, 28, 41, 54, 62, 71, 88})
"""Templates that neither model is trained on."""

SPLITS = {"teacher": 10_000_000, "student": 20_000_000, "prompts": 30_000_000, "held_out": 40_000_000,
          "unseen": 50_000_000, "tuning": 60_000_000}  # fmt: skip
"""Seed of each split. Prompts of `held_out`, `unseen` and `tuning` are never trained on."""

INSTRUCTION = " Give the result as your final answer. Do not include units."


@dataclass(frozen=True)
class Problem:
    """One word problem."""

    template: int  # number of its template in reasoning-gym
    question: str
    solution: str  # worked solution in the teacher's wording; its last line is "#### ANSWER"
    answer: str  # a whole number or a decimal


ROUNDED = frozenset({75})
"""Templates that round ("19*0.5=9"), which small numbers make worse."""


def simple(solution: str) -> bool:
    """Whether all numbers of a solution are at most `LARGEST` and have at most two decimals."""
    numbers = re.findall(r"\d+(?:\.\d+)?", solution.replace(",", ""))
    return all(float(each) <= LARGEST and len(each.partition(".")[2]) <= 2 for each in numbers)


def draw(split: str, any_number: bool = False) -> Iterator[Problem]:
    """Problems of a split without end, the same each time, none twice; `any_number`: not only simple ones."""
    import reasoning_gym

    size = 200_000
    gym: Any = reasoning_gym.create_dataset("gsm_symbolic", seed=SPLITS[split], size=size)
    unseen, asked = split == "unseen", set[str]()
    for place in range(size):
        template = gym.task_indices[place]
        if template in EXCLUDED or (template in UNSEEN) != unseen:
            continue
        entry = gym[place]
        question, solution = entry["question"].removesuffix(INSTRUCTION), entry["metadata"]["answer_cot"].strip()
        if not any_number and (template in ROUNDED or not simple(solution)):
            continue
        if question not in asked and solution.endswith(f"#### {entry['answer']}"):
            asked.add(question)
            yield Problem(template, question, solution, entry["answer"])


SHARES = (30, 30, 15, 10, 15)
"""Of sums, differences, products, quotients, and sums of three or four, among equations."""


def equation(rng: random.Random, shares: tuple[int, ...] = SHARES) -> tuple[str, str]:
    """An equation in one of the templates' notations: its left side, and its result of up to 100 (long sums: 160).

    `shares`: see `SHARES`.
    """
    kind = rng.choices("+-*/s", shares)[0]
    if kind == "+":
        result = rng.randint(5, LARGEST)
        first = rng.randint(1, result - 1)
        numbers = [first, result - first]
    elif kind == "-":
        numbers = sorted((rng.randint(1, LARGEST), rng.randint(1, LARGEST)), reverse=True)
        result = numbers[0] - numbers[1]
    elif kind in "*/":
        first = rng.randint(2, 25)
        second = rng.randint(2, max(2, LARGEST // first))
        numbers, result = ([first, second], first * second) if kind == "*" else ([first * second, first], second)
    else:
        numbers, kind = [rng.randint(1, 40) for _ in range(rng.choice((3, 3, 4)))], "+"
        result = sum(numbers)
    sign = rng.choice(("*", "*", "x")) if kind == "*" else kind
    space, unit = rng.choice(("", " ", " ")), rng.choice(("", "", "", "£", "€", "$"))
    left = f"{space}{sign}{space}".join(f"{unit}{number}" for number in numbers)
    return f"{left}{space}=", f"{space}{unit}{result}\n"


CHAIN = re.compile(r"([£€$]?)(\d+(?:\.\d+)?)((?:\s*[+-]\s*\1\d+(?:\.\d+)?){2,})(\s*)=")


def stepwise(solution: str) -> str:
    """Sums and differences of several numbers in steps: "3 + 8 + 11 = 22" -> "3 + 8 = 11 + 11 = 22"."""
    return CHAIN.sub(_in_steps, solution)


def _in_steps(chain: re.Match[str]) -> str:
    unit, total, space = chain[1], float(chain[2]), chain[4]
    written = f"{unit}{chain[2]}"
    parts = re.findall(r"(\s*([+-])\s*)[£€$]?(\d+(?:\.\d+)?)", chain[3])
    for place, (sign, kind, number) in enumerate(parts):
        total = total + float(number) if kind == "+" else total - float(number)
        written += f"{sign}{unit}{number}{space}="
        if place < len(parts) - 1:
            written += f"{space}{unit}{round(total, 2):g}"
    return written


OPENERS = ("First, ", "To begin, ", "We start here: ")
CONNECTIVES = ("Next, ", "Then, ", "After that, ", "Now ")
CLOSERS = ("So the answer is {}.", "The final result is {}.", "That gives {}.")
WORDS = {"*": "times", "x": "times", "×": "times", "+": "plus", "-": "minus", "/": "divided by", "÷": "divided by"}
LEADING = re.compile(
    r"^(?:[•\-\d]+[.)]?\s+)?(?:(?:so|then|therefore|thus|first|next|now|finally)\b,?\s+)*", re.IGNORECASE
)
COMMON = re.compile(
    r"^(?:The|There|This|That|They|He|She|It|In|On|If|Since|After|Before|Her|His|Each|Together|Its|A|An|Of|Which|While|Yesterday|Tomorrow|By|When)\b"
)
NUMBER = r"[$£€]?\d[\d,.]*%?"


def paraphrase(solution: str, rng: random.Random) -> str:
    """The same steps in the student's words: other connectives, operators and equations in words in most lines."""
    *lines, last = [line for line in solution.splitlines() if line.strip()]
    written: list[str] = []
    for line in lines:
        step = LEADING.sub("", line.strip()).rstrip(".")
        if not step:
            continue
        if COMMON.match(step):
            step = step[0].lower() + step[1:]
        if rng.random() < 0.7:
            step = re.sub(rf"(?<=[\d%)a-z])\s*([*×x+/÷-])\s*(?={NUMBER}|\()", lambda sign: f" {WORDS[sign[1]]} ", step)
            step = re.sub(r"\s*=\s*", rng.choice((", which makes ", " gives ", ", that is ")), step)
        opening = OPENERS if not written else CONNECTIVES
        written.append(rng.choice(opening) + step + ".")
    closing = rng.choice(CLOSERS).format(last.removeprefix("#### "))
    return "\n".join([*written, closing, last])
