"""Prompts for training, probing and evaluation: every row of a source is checked before anything starts.

JSONL and CSV are read here, not by `datasets`, so that an error can name the line. Heavy libraries are imported on use.
A reader yields (number from 1, row), with a `DataError` in place of a row that cannot be read.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from topd.errors import DataError
from topd.parsing import read_json

if TYPE_CHECKING:
    import datasets

PROMPT_COLUMNS = ("prompt", "problem", "question")  # the first one that a source has
TEACHER_PROMPT = "teacher_prompt"
"""Column with what the teacher reads in place of the prompt."""
RESPONSE_COLUMNS = ("response", "completion")  # the same
ROLES = ("system", "user", "assistant", "tool")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", re.ASCII)
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


Read = Callable[[object, str], Any]
"""Reads a value; the text names the value in its `DataError`."""


def load_prompts(
    source: str, *, split: str = "train", limit: int | None = None, responses: bool = False,
    also: Mapping[str, Read] | None = None,
) -> datasets.Dataset:  # fmt: skip
    """Prompts and answers from a file, a folder or the Hub, checked row by row.

    `source`: a .jsonl, .jsonl.gz, .json (a list of objects, or an object with one list), .csv or .parquet file; a
    folder written by `save_to_disk`; or a Hub dataset, "owner/name" or "owner/name:configuration". `split` picks a part
    of the latter two (a file has no parts). `limit`: keep the first N rows; all are checked.
    `responses`: every row must have a `response` or `completion` (text), returned as the column `response`. `also`:
    further columns, and the functions that read their values (None if a row has none).

    Returns the column `prompt` (text, or messages {"role", "content"}; one kind in all rows), `answer` if any row has
    one (text; None if missing or blank; a whole number is written without ".0"), and the columns of `also`. Raises
    `DataError`.
    """
    import datasets

    if limit is not None and (type(limit) is not int or limit < 1):
        raise DataError(f"limit is {limit!r}; it must be a whole number of at least 1, or None for all rows.")
    source, remedy, also = os.fspath(source), "Check the permissions.", also or {}
    try:
        reader, remedy = _reader(source)
        rows = _checked(reader(source, split, also), "line" if reader in (_jsonl, _csv) else "row", responses, also)
    except DataError as error:
        raise DataError(f"{source!r}: {error}") from None
    except Exception as error:  # from a library, the disk or the network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{source!r}: cannot be read ({reason}). {remedy}") from error
    text = datasets.Value("string")
    is_text = isinstance(rows[0][0], str)
    features: Any = {"prompt": text if is_text else datasets.List({"role": text, "content": text})}
    features |= {"answer": text, "response": text}
    columns = dict(zip([*features, *also], zip(*rows[:limit], strict=True), strict=True))
    more = {name: list(columns.pop(name)) for name in also}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    empty = [name for i, name in enumerate(features) if i and all(row[i] is None for row in rows)]
    for name, values in more.items():
        if any(value is not None for value in values):
            data = data.add_column(name, values)
    return data.remove_columns(empty)


def _reader(source: str) -> tuple[Any, str]:
    """The function that reads a source, and the remedy if it fails."""
    ending = next((ending for ending in _READERS if source.lower().endswith(ending)), "")
    if os.path.isdir(source):
        return _dataset, "Name a data file, or a folder written by save_to_disk."
    if os.path.isfile(source):
        if not ending:
            raise DataError(f"unknown kind of file. Known endings: {', '.join(_READERS)}.")
        if os.path.getsize(source) == 0:
            raise DataError("the file is empty. Write it again, or name another file.")
        return _READERS[ending], "Check its permissions; if it is damaged, write or download it again."
    folder, name = os.path.split(source)
    near = difflib.get_close_matches(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [])
    missing = "There is no such file or folder" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ".")
    if ending or not _HUB_NAME.fullmatch(source):
        raise DataError(f"{missing} Hub names have the form owner/name.")
    return _dataset, f"{missing} On the Hub: check owner/name:configuration, split, network, HF_HUB_OFFLINE, login."


def _checked(
    rows: Iterable[tuple[int, Any]], place: str, responses: bool, also: Mapping[str, Read]
) -> list[tuple[Any, ...]]:
    """(prompt, answer, response, further columns) of all rows; or a `DataError` that lists the broken ones."""
    good, broken, first = [], [], None
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise (row if isinstance(row, DataError) else DataError(f"{row!r:.40} is not an object with `prompt`"))
            column = _columns(list(row))[0]
            prompt, answer = _prompt(row[column]), _answer(row.get("answer"))
            kind = f"`{column}` is {'text' if isinstance(prompt, str) else 'a conversation'}"
            first = first or (kind, f"{place} {number}")
            if kind != first[0]:
                raise DataError(f"{kind}, but in {first[1]} {first[0]}; use one kind in all rows")
            others = [read(row.get(name), f"the {name}") for name, read in also.items()]
            own = dict(zip(also, others, strict=True)).get(TEACHER_PROMPT)
            if own is not None and isinstance(own, str) != isinstance(prompt, str):
                raise DataError(f"`{column}` and `{TEACHER_PROMPT}` are text and a conversation; use one kind for both")
            good.append((prompt, answer, _response(row) if responses else None, *others))
        except DataError as error:
            broken.append((number, f"  {place} {number}: {error}"))
    if broken:
        listed = [text for _, text in sorted(broken)[:5]] + [f"  and {len(broken) - 5} more"] * (len(broken) > 5)
        raise DataError("\n".join([f"broken rows: {len(broken)}; nothing was loaded. Fix or remove:", *listed]))
    if not good:
        raise DataError("there are no rows. Write at least one, with a `prompt`.")
    return good


def _lines(path: str, bad: dict[int, DataError]) -> Iterator[str]:
    """The lines of a file. Lines that are not UTF-8 go into `bad` and are yielded with replacement characters."""
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad[number] = DataError(f"byte {error.start + 1} of line {number} is not UTF-8; save the file as UTF-8")
                text = line.decode("utf-8", errors="replace")
            yield text.removeprefix("\ufeff") if number == 1 else text


def _parsed(text: str) -> Any:
    """The JSON value, or a `DataError` (returned, not raised)."""
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        hint = " (one object per line belongs in a .jsonl file)" if error.msg == "Extra data" else ""
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        return DataError(f"broken JSON at {where}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:
        if "appears more than once" in str(error):
            return DataError(str(error))
        return DataError("JSON with a number too long, or lists nested too deep, to read")


def _jsonl(path: str, *_: Any) -> Iterator[tuple[int, Any]]:
    bad: dict[int, DataError] = {}
    for number, line in enumerate(_lines(path, bad), 1):
        if line.strip():
            yield number, bad.get(number) or _parsed(line.rstrip("\r\n"))


def _json(path: str, *_: Any) -> Iterator[tuple[int, Any]]:
    bad: dict[int, DataError] = {}
    value = _parsed("".join(_lines(path, bad)).rstrip("\r\n"))
    if bad or isinstance(value, DataError):
        raise next(iter(bad.values()), value)
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else [value]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError("write a list of objects, or an object with exactly one list.")
    yield from enumerate(lists[0], 1)


def _csv(path: str, *_: Any) -> Iterator[tuple[int, Any]]:
    bad: dict[int, DataError] = {}
    header: list[str] = []
    row: list[str] | None = []
    reader = csv.reader(_lines(path, bad), strict=True)
    csv.field_size_limit(2**31 - 1)  # for the whole process: long fields are allowed
    while row is not None and (header or not bad):
        number = reader.line_num + 1  # where the row starts: a quoted field may hold line ends
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = []
            bad.setdefault(number, DataError(f'broken CSV ({error}); a quote inside quotes is written ""'))
        if row and not header and not bad:
            header = [name.strip() for name in row]
            _columns(header)
        elif row and len(row) != len(header):
            bad.setdefault(
                number, DataError(f"{len(row)} fields, the header has {len(header)}; quote text with commas")
            )
        elif row:
            yield number, dict(zip(header, row, strict=True))
    yield from bad.items()


def _parquet(path: str, _: str, also: Iterable[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = _columns(file.schema_arrow.names, also)
        batches = file.iter_batches(batch_size=1000, columns=names)
        for number, (batch, i) in enumerate(((table, i) for table in batches for i in range(len(table))), 1):
            try:
                yield number, {name: batch[name][i].as_py() for name in names}
            except ValueError as error:
                yield number, DataError(f"a value cannot be read ({error}); write text as UTF-8")


def _dataset(source: str, split: str, also: Iterable[str]) -> Iterator[tuple[int, Any]]:
    import datasets

    saved = os.path.isdir(source)
    data = datasets.load_from_disk(source) if saved else datasets.load_dataset(*source.split(":"), split=split)
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"there is no split {split!r}. Choose one of {list(data)}.")
        data = data[split]
    data = data.with_format(None).select_columns(_columns(data.column_names, also))
    data.data.validate(full=True)  # reading damaged columns would crash Python
    yield from enumerate(data, 1)


_READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _columns(found: list[str], also: Iterable[str] = ()) -> list[str]:
    """The columns to read, the prompt's first."""
    twice = [name for name in dict.fromkeys(found) if name and found.count(name) > 1]
    if twice:
        raise DataError(f"more than one column is called {str(twice)[:200]}; rename or remove one")
    prompt = next((name for name in PROMPT_COLUMNS if name in found), None)
    if prompt is None:
        raise DataError(f"no `prompt`, `problem` or `question` in {str(found)[:200]}; rename the one with the prompt")
    response = next((name for name in RESPONSE_COLUMNS if name in found), None)
    return [prompt, *(name for name in ("answer", response, *also) if name in found)]


def read_prompt(value: object, whose: str) -> Any:
    """A prompt in a further column; None if a row has none."""
    return None if value is None else _prompt(value, whose)


def _prompt(value: object, whose: str = "the prompt") -> Any:
    """The text, or the messages with only role and content."""
    if isinstance(value, str):
        return read_text(value, whose)
    if not isinstance(value, list) or not value:
        raise DataError(f"{whose} is {value!r:.40}; write text or a list of messages")
    for place, message in enumerate(value, 1):
        what = f"message {place} of {whose}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{what} is not an object with role and content")
        if message["role"] not in ROLES:
            raise DataError(f"{what} has the role {str(message['role'])[:40]!r}; use one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise DataError(f"{what} has tool_calls, which are not supported; write them into its content")
        read_text(message["content"], what, may_be_blank=message["role"] != "user" and place < len(value))
    if value[-1]["role"] == "assistant":
        raise DataError(f"the last message of {whose} is the assistant's; end with the user's turn")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _response(row: dict[str, Any]) -> str:
    column = next((name for name in RESPONSE_COLUMNS if name in row), None)
    if column is None:
        raise DataError("no `response` or `completion`; write what the student answered as text")
    return read_text(row[column], f"the {column}")


def read_text(value: object, what: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {value!r:.40}; write text")
    if not may_be_blank and not value.strip():
        raise DataError(f"{what} is {'blank' if value else 'empty'}; write text")
    if has_half_character(value):
        raise DataError(f"{what} holds half a character (one escape from \\ud800 to \\udfff); write both halves")
    return value


def has_half_character(text: str) -> bool:
    """Whether a text has an unpaired surrogate: JSON can escape one, UTF-8 cannot encode it."""
    return _HALF_CHARACTER.search(text) is not None


def read_flag(value: object, what: str) -> bool:
    """True or false; false for a missing value. CSV has words."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if str(value).strip().lower() in ("true", "false", ""):
        return str(value).strip().lower() == "true"
    raise DataError(f"{what} is {value!r:.40}; write true or false")


def _answer(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return read_text(value, "the answer") if value and value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise DataError(f"the answer is {value!r:.40}; write text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"the answer is {value}, not a number; write text, a number or null")
    return str(int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value)
