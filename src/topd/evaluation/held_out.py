"""Figures of an evaluation during training, from the records of its responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from topd.evaluation.accuracy import accuracy_interval
from topd.evaluation.benchmarks import ProblemSet

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
    count = len(problem_set.problems)
    chosen = range(count) if count < KEPT_RESPONSES else [i * count // KEPT_RESPONSES for i in range(KEPT_RESPONSES)]
    return [
        {
            "version": RECORD_VERSION,
            "step": step,
            "problem": _text(problem_set.problems[place].prompt),
            "response": records[place * samples]["text"],
            "answer": problem_set.problems[place].answer,
            "right": records[place * samples]["right"],
            "ended": not records[place * samples]["truncated"],
        }
        for place in chosen
    ]


def _text(prompt: Any) -> str:
    """A problem's text; of messages the last one's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
