"""Responses to held-out problems that training kept: those of each arm's newest evaluation, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.report.elements import plural
from topd.report.reading import clean, read_lines

if TYPE_CHECKING:
    from topd.report.records import Arm

LONGEST = 600
"""Characters shown of a problem, and of a response."""


@dataclass(frozen=True)
class HeldOutResponse:
    """One response, judged. `ended`: by an end token, not by the length limit."""

    step: int
    problem: str
    response: str
    answer: str
    right: bool
    ended: bool


def load_responses(file: Path, arm: str, notes: list[str]) -> list[HeldOutResponse]:
    """The responses of the newest evaluation, in the order of the problems."""
    newest: dict[str, HeldOutResponse] = {}
    for each in read_lines(file, f"{arm}/{file.name}", notes, _response):
        if newest and each.step > next(iter(newest.values())).step:
            newest.clear()
        newest[each.problem] = each  # an evaluation can be repeated at a step
    return list(newest.values())


def _response(record: Mapping[str, Any]) -> HeldOutResponse:
    return HeldOutResponse(
        step=int(record["step"]),
        problem=clean(record["problem"]),
        response=clean(record["response"]),
        answer=clean(record["answer"]),
        right=bool(record["right"]),
        ended=bool(record.get("ended", True)),
    )


def responses_tables(arms: Sequence[Arm]) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Of each arm that has responses, a title and rows of problem, response, wanted answer and verdict."""
    tables = []
    for arm in arms:
        rows = [
            (_shown(each.problem), _shown(each.response), each.answer,
             ("right" if each.right else "wrong") + ("" if each.ended else ", truncated"))
            for each in arm.responses
        ]  # fmt: skip
        if rows:
            of = f"{arm.name}, " if len(arms) > 1 else ""
            step = arm.responses[0].step
            tables.append((f"{of}{plural(len(rows), 'response')} to held-out problems, step {step}", rows))
    return tables


def _shown(text: str) -> str:
    """A long text's beginning and its end, where the answer is."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
