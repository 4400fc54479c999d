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


@dataclass(frozen=True)
class ResponsesTable:
    """What the page shows of one arm: (problem, response, wanted answer, verdict) in each row."""

    title: str
    rows: Sequence[tuple[str, str, str, str]]


def responses_tables(arms: Sequence[Arm]) -> list[ResponsesTable]:
    """A table of each arm that has responses."""
    return [_table(arm, f"{arm.name}, " if len(arms) > 1 else "") for arm in arms if arm.responses]


def _table(arm: Arm, of: str) -> ResponsesTable:
    rows = [(_shown(each.problem), _shown(each.response), each.answer, _verdict(each)) for each in arm.responses]
    return ResponsesTable(
        f"{of}{plural(len(rows), 'response')} to held-out problems, step {arm.responses[0].step}", rows
    )


def _verdict(response: HeldOutResponse) -> str:
    return ("right" if response.right else "wrong") + ("" if response.ended else ", truncated")


def _shown(text: str) -> str:
    """A long text's beginning and its end, where the answer is."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
