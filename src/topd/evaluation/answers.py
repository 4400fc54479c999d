"""Whether a response is right: the answer that it gives, and whether that is the wanted one.

A response that gives no readable answer is `parsed=False`, so that a table can count it apart from a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from topd.evaluation.lm_eval_answers import given_answer, same_text

Rule = Literal["math", "integer", "lm_eval", "embedded"]
"""How answers are compared.

* "math": the content of the last `\\boxed{}`, by mathematical equality (math-verify); boxes joined by a comma, "and" or
  "or" count as one list.
* "integer": the content of the last `\\boxed{}`, exactly, as a whole number (AIME: 0 to 999): `073`, `73.0`,
  `\\textbf{73}`, `73 \\text{ cm}`, and what follows the equals sign in `m+n = 73`.
* "lm_eval": as the AIME tasks of lm-evaluation-harness do; see `lm_eval_answers`.
* "embedded": the embedded task's closing sentence.
"""


@dataclass(frozen=True)
class Verdict:
    """What a response answers.

    Attributes:
        extracted: the answer as written, None if there is none.
        right: whether it is the wanted one.
        parsed: whether it could be read and compared. False: no box, a last box that is never closed, one that is no
            number (rule "integer"), no LaTeX, or too hard to compare in time (rule "math"), neither a box nor dollar
            signs (rule "lm_eval", unless the whole response is the answer). `right` is then False.
    """

    extracted: str | None
    right: bool
    parsed: bool


def verdict(text: str, answer: str, rule: Rule) -> Verdict:
    """Judge one response.

    Args:
        text: the whole response.
        answer: the wanted answer, without a box.
        rule: how to compare.

    Raises:
        TOPDError: rule "math" without the package math-verify.
    """
    if rule == "embedded":
        from topd.embedded.task import extract_answer

        extracted = extract_answer(text)
        return Verdict(extracted, extracted == answer, extracted is not None)
    if rule == "lm_eval":
        given, marked = given_answer(text)
        right = same_text(given, answer)
        return Verdict(given if marked or right else None, right, marked or right)
    extracted = last_boxed(text)
    if extracted is None:
        return Verdict(None, False, False)
    if rule == "integer":
        number = _whole_number(extracted)
        return Verdict(extracted, number is not None and number == _whole_number(answer), number is not None)
    if extracted == answer:
        return Verdict(extracted, True, True)
    from topd.evaluation.equivalence import same_answer

    same = same_answer(answer, extracted)
    return Verdict(extracted, same is True, same is not None)


_BRACE = re.compile(r"(?P<box>\\(?:f?boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_JOINT = re.compile(r"[\s$]*(?:,|,?\s*(?:\\text\{)?\s*(?:and|or)\s*\}?)[\s$]*")
_FONT = r"\\(?:text|math)(?:bf|it|rm|sf|tt)?|\\(?:boldsymbol|bm|displaystyle|bf|rm|it)"
_UNIT = re.compile(r"(?<=[0-9}])\s*(?:\\[,;:! ]\s*)*\\(?:text|mathrm)\{[^{}0-9]*\}(?:\^\{?[0-9]\}?)?[\s$.]*$")
_DECORATION = re.compile(rf"\\[,;:! ]\s*|\^\{{?\\circ\}}?|\\degree|(?:{_FONT})(?![a-zA-Z])|[${{}}]")
_WHOLE = re.compile(r"[+-]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})")
_NO_FRACTION = re.compile(r"\.0*\s*$")
_SEVERAL = re.compile(r",(?![0-9]{3})|;|\b(?:and|or)\b")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}`, stripped; of several joined by a comma, "and" or "or", all of them.

    None if the last one is never closed: the response was cut inside its answer, and an earlier box is not that answer.
    """
    contents: list[str] = []
    after = 0
    for start, end in reversed(_boxes(text)):
        if contents and not _JOINT.fullmatch(text[end + 1 : after]):
            break
        contents.insert(0, text[text.index("{", start) + 1 : end].strip())
        after = start
    return ", ".join(contents) or None


def _boxes(text: str) -> list[tuple[int, int]]:
    """Start and closing brace of all boxes that are closed, not empty, and hold no other box; none, if the last box to
    begin is never closed."""
    boxes: list[tuple[int, int]] = []
    opened: list[re.Match[str] | None] = []  # None: a brace of something else
    last = None
    for match in _BRACE.finditer(text):
        if match["box"] or match[0] == "{":
            last = match if match["box"] else last
            opened.append(match if match["box"] else None)
        elif match[0] == "}" and opened:
            box = opened.pop()
            holds_a_box = bool(box and boxes and boxes[-1][0] > box.start())
            if box and not holds_a_box and text[box.end() : match.start()].strip():
                boxes.append((box.start(), match.start()))
    return [] if last is not None and last in opened else boxes


def _whole_number(text: str) -> int | None:
    """The whole number that a box holds, after the last equals sign if it has one.

    Fonts, units, degree signs, thousands separators, leading zeros and zero decimals do not matter.
    """
    *before, number = text.split("=")
    if any(_SEVERAL.search(_DECORATION.sub("", side)) for side in before):  # a = 73, b = 4
        return None
    bare = _NO_FRACTION.sub("", _DECORATION.sub("", _UNIT.sub("", number.strip())).strip())
    return int(bare.replace(",", "")) if _WHOLE.fullmatch(bare) else None
