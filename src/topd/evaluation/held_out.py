"""Figures of an evaluation during training, from the records of its responses."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from topd.evaluation.accuracy import accuracy_interval
from topd.evaluation.benchmarks import ProblemSet, text_of

T = TypeVar("T")

RECORD_VERSION = 1
"""Of the responses that are kept."""
KEPT_RESPONSES = 8
"""Responses kept of each evaluation."""

TIMES, AT_LEAST, TAIL = 4, 100, 4000
"""A loop: the end of a response is one passage at least four times in a row, over at least 100 characters. A passage of
up to 1,000 characters is found. Our choice."""


def figures(records: Sequence[dict[str, Any]], samples: int) -> dict[str, float]:
    """Accuracy with its 95 % interval over problems, and what the responses look like. Shares are from 0 to 1.

    Args:
        records: as `record_of` makes them, [problem x sample], the samples of a problem next to each other.
        samples: of each problem.
    """
    right = np.array([record["right"] for record in records], dtype=float).reshape(-1, samples)
    found = accuracy_interval([right])
    return {
        "accuracy": found.mean,
        "accuracy_low": found.low,
        "accuracy_high": found.high,
        "ended": float(np.mean([not record["truncated"] for record in records])),
        "mean_length": float(np.mean([record["tokens"] for record in records])),
        "repeated": float(np.mean([ends_in_a_loop(record["text"]) for record in records])),
    }


def ends_in_a_loop(text: str) -> bool:
    """Whether a response ends in one passage over and over; see `TIMES`."""
    tail = text.rstrip()[-TAIL:]
    for period in range(1, len(tail) // TIMES + 1):
        span = max(TIMES * period, AT_LEAST)
        if span > len(tail):
            return False
        if tail[-span:-period] == tail[period - span :]:
            return True
    return False


def kept_responses(
    records: Sequence[dict[str, Any]], problem_set: ProblemSet, samples: int, step: int
) -> list[dict[str, Any]]:
    """The first response to each of a few problems, spread over the set and the same at each evaluation.

    Args:
        records: as in `figures`.
        step: optimizer steps so far.
    """
    first = list(zip(problem_set.problems, records[::samples], strict=True))
    return [
        {
            "version": RECORD_VERSION,
            "step": step,
            "problem": text_of(problem.prompt),
            "response": record["text"],
            "answer": problem.answer,
            "right": record["right"],
            "ended": not record["truncated"],
        }
        for problem, record in spread(first, KEPT_RESPONSES)
    ]


def spread(items: list[T], count: int) -> list[T]:
    """`count` of the items at equal distances, or all if there are fewer."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else items
