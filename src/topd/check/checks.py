"""All checks, in the order of the table."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from topd.check import machine, optional, prompts, quality, tokens
from topd.check.findings import Finding, failure, worst
from topd.check.setup import Setup
from topd.errors import TOPDError

QUICK: dict[str, Callable[[Setup], Finding | None]] = {
    "pair": optional.one_model,
    "libraries": optional.libraries,
    "sampling": optional.sampling,
    "evaluation": optional.evaluation,
    "benchmark": optional.benchmark,
    "adapters": optional.adapters,
    "hub": optional.hub,
    "vocabulary": tokens.vocabulary,
    "tokenization": tokens.texts,
    "special tokens": tokens.special_tokens,
    "end tokens": tokens.end_tokens,
    "output heads": tokens.heads,
    "chat templates": tokens.templates,
    "data": prompts.sample,
    "teacher prompt": optional.teacher_prompt,
    "batch": prompts.batch,
    "context": prompts.context,
    "precision": machine.precision,
    "memory": machine.memory,
    "disk": machine.disk,
    "teacher's server": optional.server,
}
"""Checks without weights, which `topd train` runs first. They return None if a run does not use what they check."""


def quick_findings(setup: Setup) -> list[Finding]:
    return _findings(QUICK, setup)


def findings_on_models(setup: Setup, student: Any, teacher: Any, count: int, max_new_tokens: int) -> list[Finding]:
    ways = _findings({"fast paths": quality.ways}, student, teacher)
    if worst(ways) == "error":
        return ways  # a model that cannot be distilled
    checks = {"rollouts": quality.rollout_figures, "teacher": quality.teacher_knows_more}
    return ways + _findings(checks, setup, student, teacher, count, max_new_tokens)


def _findings(checks: dict[str, Any], *given: Any) -> list[Finding]:
    """What the checks found; the `TOPDError` of a check is a finding too."""
    found = []
    for name, check in checks.items():
        try:
            finding = check(*given)
        except TOPDError as error:
            finding = failure(error)
        if finding is not None:
            found.append(replace(finding, check=name))
    return found
