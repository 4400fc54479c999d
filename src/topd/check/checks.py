"""All checks, in the order in which a reader wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from topd.check import machine, memory, prompts, quality, server, templates, tokens
from topd.check.asked import ASKED
from topd.check.finding import Finding
from topd.check.setup import Setup
from topd.errors import TOPDError

Check = Callable[[Setup], Finding]
QUICK: dict[str, Check] = {
    "vocabulary": tokens.vocabulary,
    "tokenization": tokens.texts,
    "special tokens": tokens.special_tokens,
    "end tokens": tokens.end_tokens,
    "output heads": tokens.heads,
    "chat templates": templates.templates,
    "data": prompts.sample,
    "batch": prompts.batch,
    "context": prompts.context,
    "precision": machine.precision,
    "memory": memory.memory,
    "disk": machine.disk,
}
"""What needs no weights: `topd train` begins with them."""


def quick_findings(setup: Setup) -> list[Finding]:
    """What can be said without weights."""
    checks = dict(QUICK)
    if setup.config.teacher_window_server is not None:
        checks[server.NAME] = server.server
    asked = [_finding(name, partial(check, setup)) for name, check in ASKED.items()]
    return [finding for finding in asked if finding] + [
        finding for name, check in checks.items() if (finding := _finding(name, partial(check, setup)))
    ]


def findings_on_models(setup: Setup, student: Any, teacher: Any, count: int, max_new_tokens: int) -> list[Finding]:
    """What a few rollouts say."""

    def rollouts() -> Finding:
        return quality.rollout_figures(setup, student, teacher, quality.sampled(setup, student, count, max_new_tokens))

    def teacher_() -> Finding:
        return quality.teacher_knows_more(setup, student, teacher, count, max_new_tokens)

    ways = _finding("ways", partial(quality.ways, student, teacher))
    if ways is not None and ways.verdict == "error":
        return [ways]  # a model that cannot be distilled
    found = [ways, _finding("rollouts", rollouts), _finding("teacher", teacher_)]
    return [finding for finding in found if finding]


def _finding(name: str, check: Callable[[], Finding | None]) -> Finding | None:
    """A check that cannot be made is a finding too."""
    try:
        return check()
    except TOPDError as error:
        found, _, remedy = str(error).partition(". ")
        return Finding(name, "error", found, remedy)


def errors_in_words(findings: Sequence[Finding]) -> str:
    """For a command that stops on them."""
    lines = [f"  {f.check}: {f.found}. {f.remedy}" for f in findings if f.verdict == "error"]
    return "\n".join(["This run would not do what it should:", *lines])
