"""A small stand-in for reasoning-gym, which needs a C compiler to install. The real one: tests/ladder, slow."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

LEGS = {"sea slug": 0, "duck": 2, "cow": 4, "bee": 6, "crab": 10}
Metadata = dict[str, Any]


def chain(rng: random.Random) -> Metadata:
    expression = f" {rng.choice('+-')} ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(2, 6)))
    return {"expression": expression, "answer": eval(expression)}


def parenthesised(rng: random.Random) -> Metadata:
    def part(depth: int) -> str:
        terms = [
            f"( {part(depth - 1)} )" if depth and rng.random() < 0.4 else str(rng.randint(-9, 9))
            for _ in range(rng.randint(2, 3))
        ]
        return " ".join(word for term in terms for word in (term, rng.choice("+-*")))[:-2]

    expression = part(2)
    return {"expression": expression, "answer": eval(expression)}


def divisor(rng: random.Random) -> Metadata:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return {"numbers": [a, b], "answer": math.gcd(a, b)}


def product(rng: random.Random) -> Metadata:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    return {"expression": f"{a} * {b}", "answer": a * b}


def equation(rng: random.Random) -> Metadata:
    a, b, x = rng.choice([-3, 1, 2, 12]), rng.choice([-40, -7, 0, 5, 31]), rng.randint(1, 20)
    if a < 0:  # as sympy writes it: the constant first
        left = f"{b} - {-a}*z" if b else f"{a}*z"
    else:
        left = ("z" if a == 1 else f"{a}*z") + (f" {'-' if b < 0 else '+'} {abs(b)}" if b else "")
    return {"equation": f"{left} = {a * x + b}", "variable": "z", "answer": x}


def animals(rng: random.Random) -> Metadata:
    chosen = {animal: rng.randint(1, 9) for animal in rng.sample(list(LEGS), rng.randint(2, 5))}
    return {"animals": chosen, "answer": sum(count * LEGS[animal] for animal, count in chosen.items())}


MAKERS: dict[str, Callable[[random.Random], Metadata]] = {
    "chain_sum": chain,
    "basic_arithmetic": parenthesised,
    "gcd": divisor,
    "products": product,
    "simple_equations": equation,
    "leg_counting": animals,
}


class Entries:
    """A dataset of reasoning-gym, as far as the ladder uses it."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = MAKERS[self.name](random.Random(self.seed + index))
        question = f"{self.name}: {found.get('expression', found)}"
        return {"question": question, "answer": str(found.pop("answer")), "metadata": found}


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.leg_counting"):
        module = ModuleType(name)
        vars(module).update(ANIMALS=LEGS, create_dataset=lambda name, size, seed, **own: Entries(name, seed))
        monkeypatch.setitem(sys.modules, name, module)
