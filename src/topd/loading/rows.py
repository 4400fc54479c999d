"""One row of people's data as a prompt, an answer and a response: which column, and which form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from topd.errors import DataError

PROMPT_COLUMNS = ("prompt", "problem", "question")  # the first one that a source has
CONVERSATION_COLUMNS = ("messages", "conversations")  # the same; their last answer is not part of the prompt
BESIDE_CONVERSATIONS = ("system", "tools")  # ShareGPT's: a system prompt; tools, which are refused
TEACHER_PROMPT = "teacher_prompt"
"""Column with what the teacher reads in place of the prompt."""
RESPONSE_COLUMNS = ("response", "completion")  # the same
SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT's `from` that have another name in messages."""
ROLES = ("system", "user", "assistant", "tool")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]""")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class DataForm:
    """Where the prompt of a row is, and what is put before it."""

    # name of the column with the prompt; None: the first of `PROMPT_COLUMNS` and `CONVERSATION_COLUMNS`
    column: str | None = None
    # a system prompt, for rows that have none of their own. Text becomes the user's message after it.
    system: str | None = None
    config: str | None = None  # configuration of a dataset that `load_dataset` reads

    def columns(self, found: list[str], also: Iterable[str] = ()) -> list[str]:
        """The columns to read, the prompt's first."""
        twice = [name for name in dict.fromkeys(found) if name and found.count(name) > 1]
        if twice:
            raise DataError(f"more than one column is called {str(twice)[:200]}; rename or remove one")
        wanted = (self.column,) if self.column else (*PROMPT_COLUMNS, *CONVERSATION_COLUMNS)
        prompt = next((name for name in wanted if name in found), None)
        if prompt is None:
            names = f"column `{self.column}`" if self.column else ", ".join(f"`{name}`" for name in wanted)
            raise DataError(f"no {names} in {str(found)[:200]}; rename one, or name it: --prompt-column")
        response = next((name for name in RESPONSE_COLUMNS if name in found), None)
        beside = BESIDE_CONVERSATIONS if prompt in CONVERSATION_COLUMNS else ()
        others = [name for name in ("answer", response, *beside, *also) if name in found and name != prompt]
        return [prompt, *others]

    def read(self, row: dict[str, Any], column: str, responses: bool) -> tuple[Any, str | None, str | None]:
        """Prompt, answer and response of a row, checked; the prompt is in `column`."""
        prompt, answered = read_prompt(row[column], column, answered=column in CONVERSATION_COLUMNS)
        system = self.system
        if column in CONVERSATION_COLUMNS:
            if row.get("tools"):
                raise DataError("`tools` is given, and tools are not supported; write them into a system message")
            system = read_text(row["system"], "`system`") if row.get("system") else system
        if system is not None:
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            own = prompt[0]["role"] == "system"
            prompt = prompt if own else [{"role": "system", "content": system}, *prompt]
        answer = read_answer(row.get("answer")) if column != "answer" else None
        return prompt, answer, _response(row, answered) if responses else None


def read_prompt(value: object, column: str = "prompt", *, answered: bool = False) -> tuple[Any, str | None]:
    """The text, or the messages with only role and content; and the answer that was cut off.

    `value`: text; messages with `role` and `content`; or ShareGPT's with `from` and `value`. Content is text, or a list
    of text parts. `answered`: whether the conversation may end with the assistant's answer, which is cut off.
    """
    the = "the prompt" if column == "prompt" else f"`{column}`"
    if isinstance(value, str):
        if _WRITTEN_MESSAGES.match(value):
            raise DataError(f"{the} is a list of messages written as text; write it as a list, in JSONL or Parquet")
        return read_text(value, the), None
    if not isinstance(value, list) or not value:
        raise DataError(f"{the} is {value!r:.40}; write text or a list of messages")
    messages = [_message(message, f"message {place} of {the}") for place, message in enumerate(value, 1)]
    cut = messages.pop()["content"] if answered and messages[-1]["role"] == "assistant" else None
    if not messages:
        raise DataError(f"{the} has only the assistant's answer; write the user's turn before it")
    for place, message in enumerate(messages, 1):
        blank = message["role"] != "user" and place < len(messages)
        read_text(message["content"], f"message {place} of {the}", may_be_blank=blank)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"the last message of {the} is the assistant's; end with the user's turn")
    return messages, cut


def read_teacher_prompt(value: object, what: str) -> Any:
    """The text or the messages of the column `TEACHER_PROMPT`; None if a row has none."""
    return None if value is None else read_prompt(value, TEACHER_PROMPT)[0]


def _message(message: object, what: str) -> dict[str, Any]:
    """Role and content of a message."""
    if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
        message = {**message, "role": SPEAKERS.get(str(message["from"]), message["from"]), "content": message["value"]}
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{what} is not an object with role and content, or from and value")
    if message["role"] not in ROLES:
        known = ", ".join(ROLES) if "from" not in message else f"{', '.join(SPEAKERS)}, {', '.join(ROLES)}"
        raise DataError(f"{what} has the role {str(message['role'])[:40]!r}; use one of {known}")
    if message.get("tool_calls"):
        raise DataError(f"{what} has tool_calls, which are not supported; write them into its content")
    return {"role": message["role"], "content": _content(message["content"], what)}


def _content(content: object, what: str) -> object:
    """Text parts joined; other content as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in ("text", None) or not isinstance(part.get("text"), str):
            found = f"a part of type {kind!r:.40}" if kind not in ("text", None) else f"the part {part!r:.40}"
            raise DataError(f'{what} has {found}; only text parts, {{"type": "text", "text": ...}}, are read')
    return "".join(part["text"] for part in content)


def _response(row: dict[str, Any], answered: str | None) -> str:
    for column in RESPONSE_COLUMNS:
        if column in row:
            return read_text(row[column], f"the {column}")
    if answered is None:
        raise DataError("no `response` or `completion`; write what the student answered as text")
    return read_text(answered, "the assistant's last message")


def read_text(value: object, what: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {value!r:.40}; write text")
    if not may_be_blank and not value.strip():
        raise DataError(f"{what} is {'blank' if value else 'empty'}; write text")
    if has_half_character(value):
        raise DataError(f"{what} contains half a character (one escape from \\ud800 to \\udfff); write both halves")
    return value


def has_half_character(text: str) -> bool:
    """Whether a text has an unpaired surrogate: JSON can escape one, UTF-8 cannot encode it."""
    return _HALF_CHARACTER.search(text) is not None


def read_flag(value: object, what: str) -> bool:
    """True or false; false for a missing value. CSV has words."""
    text = "" if value is None else str(value).strip().lower()
    if text not in ("true", "false", ""):
        raise DataError(f"{what} is {value!r:.40}; write true or false")
    return text == "true"


def read_answer(value: object) -> str | None:
    """The answer as text; None if there is none. GSM8K's worked solutions end in `#### ` and the answer."""
    if value is None or isinstance(value, str):
        _, mark, last = (value or "").rpartition("####")
        text = _THOUSANDS.sub("", last).strip() if mark else value
        return read_text(text, "the answer") if text and text.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise DataError(f"the answer is {value!r:.40}; write text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"the answer is {value}, not a number; write text, a number or null")
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return f"{Decimal(int(value) if whole else str(value)):f}"  # 1e-05 would read as e - 5
