"""Whether a response is right by the rule of lm-evaluation-harness's AIME tasks, which the paper used.

Written from what the tasks do (`lm_eval/tasks/aime` of EleutherAI/lm-evaluation-harness as of 2026-08-21): where the
answer is taken from, and the string normalisation of MATH, oddities included. No code of the harness is here.
"""

from __future__ import annotations

import re

PROMPT = "Question: {problem}\nAnswer:"
"""The tasks' prompt, without examples. It does not ask for a box."""
STOPS = ("Question:", "</s>", "<|im_end|>", "<|eot_id|>")
"""Generation ends at these; what follows is not read."""

_SPACE = " "
_BOX = "\\boxed"
_BEFORE_UNITS = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip
_AFTER_UNITS = (("\\%", ""), ("\\%", ""), (" .", " 0."), ("{.", "{0."))  # the first one twice: "\\\\%%" holds two


def given_answer(text: str) -> tuple[str, bool]:
    """The answer that a response gives, and whether it stands in a box or between dollar signs.

    The last box; without a closed one, what is between the first and the last dollar sign; without two, the whole text.
    """
    for stop in STOPS:
        text = text.partition(stop)[0]
    box = _last_box(text)
    if box is not None:
        return box, True
    first, last = text.find("$"), text.rfind("$")
    return (text[first + 1 : last], True) if first < last else (text, False)


def same_text(one: str, other: str) -> bool:
    """Whether two answers are the same string once normalised; as they are where one cannot be normalised."""
    try:
        return normalised(one) == normalised(other)
    except ValueError:
        return one == other


def _last_box(text: str) -> str | None:
    """What the last box holds; `\\boxed 7`, if there is one, before all others: up to the next dollar sign."""
    if _BOX + _SPACE in text:
        return text.rpartition(_BOX + _SPACE)[2].partition("$")[0]
    start = text.rfind(_BOX + "{")
    if start < 0 or start != text.rfind(_BOX):
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len(_BOX) + 1 : start + brace.start()]
    return None


def normalised(text: str) -> str:
    """MATH's normal form of an answer.

    Raises:
        ValueError: there is none (several units, a root or fraction of nothing, a quotient of no two integers).
    """
    for old, new in _BEFORE_UNITS:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("More than one unit.")
    for old, new in _AFTER_UNITS:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    name, *values = text.split("=")
    if len(values) == 1 and len(name) <= 2:  # "x=" and the like
        text = values[0]
    if re.search(r"\\sqrt(?:\Z|\\sqrt)", text):
        raise ValueError("A root of nothing.")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(_SPACE, "")
    text = _braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    if text.count("/") == 1:
        above, below = map(int, text.split("/"))
        if text == f"{above}/{below}":
            return f"\\frac{{{above}}}{{{below}}}"
    return text


def _braced_fractions(text: str) -> str:
    """`\\frac12` as `\\frac{1}{2}`; the text as it is where a fraction has one character only."""
    whole, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            raise ValueError("A fraction of nothing.")
        if part[0] != "{" and len(part) < 2:
            return text
        if part[0] != "{":
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        whole += "\\frac" + part
    return whole
