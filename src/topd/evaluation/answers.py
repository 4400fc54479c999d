"""Whether a response is right: the answer extracted from it, compared with the wanted one.

`parsed=False` marks a response without a readable answer, so that tables can count it apart from a wrong answer.

The rule "lm_eval" follows the AIME tasks of lm-evaluation-harness, which the paper used (`lm_eval/tasks/aime` of
EleutherAI/lm-evaluation-harness as of 2026-08-21): where the answer is extracted, and the string normalization of MATH,
with its oddities. It was written from their behavior and contains no code of the harness.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Rule = Literal["math", "integer", "gsm8k", "lm_eval", "embedded"]
"""How answers are compared.

* "math": the content of the last `\\boxed{}`, by mathematical equality (math-verify); boxes joined by a comma, "and" or
  "or" count as one list.
* "integer": the content of the last `\\boxed{}`, exactly, as a whole number (AIME: 0 to 999): `073`, `73.0`,
  `\\textbf{73}`, `73 \\text{ cm}`, and what follows the equals sign in `m+n = 73`.
* "gsm8k": the last number behind a `####`, by value: `1,234` and `1234.0` are the same, and so are `1/2` and `.5`. A
  unit may follow it.
* "lm_eval": as the AIME tasks of lm-evaluation-harness; see the module.
* "embedded": the embedded task's closing sentence.
"""


@dataclass(frozen=True)
class Verdict:
    """The judgement of a response.

    Attributes:
        extracted: the answer as written, None if there is none.
        right: whether it is the wanted answer.
        parsed: whether it could be parsed and compared; if not, `right` is False. Not parsed are: no box, a
            last box that is never closed, a box without a number (rule "integer"), not LaTeX or not compared in
            time (rule "math"), neither a box nor dollar signs (rule "lm_eval", unless the whole response is the
            answer).
    """

    extracted: str | None
    right: bool
    parsed: bool


def verdict(text: str, answer: str, rule: Rule) -> Verdict:
    """Judge one whole response; `answer` is the wanted one, without a box. Rule "math" needs math-verify."""
    if rule == "embedded":
        from topd.embedded.task import extract_answer

        extracted = extract_answer(text)
        return Verdict(extracted, extracted == answer, extracted is not None)
    if rule == "gsm8k":
        found = _HASHES.findall(text)
        if not found:
            return Verdict(None, False, False)
        value = _number(found[-1])
        return Verdict(found[-1], value is not None and value == _number(answer), value is not None)
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


def can_be_right(answer: str, rule: Rule) -> bool:
    """Whether a response can match this answer. The rules for numbers read nothing else."""
    written = {"integer": rf"\boxed{{{answer}}}", "gsm8k": f"#### {answer}"}
    return rule not in written or verdict(written[rule], answer, rule).right


_HASHES = re.compile(r"####\s*(?:\\?[$£€])?(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?)")
_BRACE = re.compile(r"(?P<box>\\(?:f?boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_JOINT = re.compile(r"[\s$]*(?:,|,?\s*(?:\\text\{)?\s*(?:and|or)\s*\}?)[\s$]*")
_FONT = r"\\(?:text|math)(?:bf|it|rm|sf|tt)?|\\(?:boldsymbol|bm|displaystyle|bf|rm|it)"
_UNIT = re.compile(r"(?<=[0-9}])\s*(?:\\[,;:! ]\s*)*\\(?:text|mathrm)\{[^{}0-9]*\}(?:\^\{?[0-9]\}?)?[\s$.]*$")
_DECORATION = re.compile(rf"\\[,;:! ]\s*|\^\{{?\\circ\}}?|\\degree|(?:{_FONT})(?![a-zA-Z])|[${{}}]")
_WHOLE = re.compile(r"[+-]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})")
_NO_FRACTION = re.compile(r"\.0*\s*$")
_SEVERAL = re.compile(r",(?![0-9]{3})|;|\b(?:and|or)\b")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}`, stripped; several boxes joined by a comma, "and" or "or" count as one.

    None if the last box is never closed: the response was truncated inside its answer, and an earlier box is not it.
    """
    contents: list[str] = []
    after = 0
    for start, end in reversed(_boxes(text)):
        if contents and not _JOINT.fullmatch(text[end + 1 : after]):
            break
        contents.insert(0, text[text.index("{", start) + 1 : end].strip().removesuffix("\\"))  # of "\\ ", a space
        after = start
    return ", ".join(contents) or None


def _boxes(text: str) -> list[tuple[int, int]]:
    """Start and closing brace of all closed, non-empty boxes without another box inside; none if the last box is never
    closed."""
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


def _number(text: str) -> Fraction | None:
    """The value of a number; None for anything else."""
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _whole_number(text: str) -> int | None:
    """The whole number in a box, after the last equals sign if there is one.

    Fonts, units, degree signs, thousands separators, leading zeros and zero decimals are ignored.
    """
    *before, number = text.split("=")
    if any(_SEVERAL.search(_DECORATION.sub("", side)) for side in before):  # a = 73, b = 4
        return None
    bare = _NO_FRACTION.sub("", _DECORATION.sub("", _UNIT.sub("", number.strip())).strip())
    return int(bare.replace(",", "")) if _WHOLE.fullmatch(bare) else None


LM_EVAL_PROMPT = "Question: {problem}\nAnswer:"
"""The harness's prompt, without examples. It does not ask for a box."""
STOPS = ("Question:", "</s>", "<|im_end|>", "<|eot_id|>")
"""Generation ends at these; text after them is ignored."""

_BOX = "\\boxed"
_BEFORE_UNITS = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip
_AFTER_UNITS = (("\\%", ""), ("\\%", ""), (" .", " 0."), ("{.", "{0."))  # the first one twice: "\\\\%%" holds two


def given_answer(text: str) -> tuple[str, bool]:
    """The answer in a response, and whether it is in a box or between dollar signs.

    The last box; without a closed box, the text between the first and the last dollar sign; else the whole text.
    """
    for stop in STOPS:
        text = text.partition(stop)[0]
    box = _last_box(text)
    if box is not None:
        return box, True
    first, last = text.find("$"), text.rfind("$")
    return (text[first + 1 : last], True) if first < last else (text, False)


def same_text(one: str, other: str) -> bool:
    """Whether two answers are the same string when normalised; unnormalised if one cannot be normalised."""
    try:
        return normalised(one) == normalised(other)
    except ValueError:
        return one == other


def _last_box(text: str) -> str | None:
    """Content of the last box. `\\boxed 7`, up to the next dollar sign, takes precedence."""
    if _BOX + " " in text:
        return text.rpartition(_BOX + " ")[2].partition("$")[0]
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

    Raises `ValueError` if there is none (several units, an empty root or fraction, a quotient not of two integers).
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
    text = _braced_fractions(re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", ""))
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
