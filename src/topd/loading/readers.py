"""Rows of a file, a folder or the Hub.

JSONL and CSV are read here, not by `datasets`, so that an error can name the line. Heavy libraries are imported on use.
A reader takes the source, a function from its columns to those to read, the split, the configuration, and whether to
stream; it yields (number from 1, row), with a `DataError` in place of a row that cannot be read.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from topd.errors import DataError
from topd.parsing import read_json

Columns = Callable[[list[str]], list[str]]
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", re.ASCII)


def reader_of(source: str) -> tuple[Any, str, str]:
    """The function that reads a source, what it numbers (lines of a text file, or rows), and the remedy if it fails."""
    ending = next((ending for ending in _READERS if source.lower().endswith(ending)), "")
    if os.path.isdir(source):
        return _dataset, "row", "Use a data file, a folder written by save_to_disk, or one that load_dataset reads."
    if os.path.isfile(source):
        if not ending:
            raise DataError(f"unknown kind of file. Known endings: {', '.join(_READERS)}.")
        if os.path.getsize(source) == 0:
            raise DataError("the file is empty. Write it again, or use another file.")
        return *_READERS[ending], "Check its permissions; if it is damaged, write or download it again."
    folder, name = os.path.split(source)
    near = difflib.get_close_matches(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [])
    missing = "There is no such file or folder" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ".")
    if ending or not _HUB_NAME.fullmatch(source):
        raise DataError(f"{missing} Hub names have the form owner/name.")
    remedy = f"{missing} On the Hub: check owner/name:configuration, split, network, HF_HUB_OFFLINE, login."
    return _dataset, "row", remedy


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
        twice = "appears more than once" in str(error)
        return DataError(str(error) if twice else "JSON with a number too long, or lists nested too deep, to read")


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


def _csv(path: str, columns: Columns, *_: Any) -> Iterator[tuple[int, Any]]:
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
            columns(header)
        elif row and len(row) != len(header):
            bad.setdefault(
                number, DataError(f"{len(row)} fields, the header has {len(header)}; quote text with commas")
            )
        elif row:
            yield number, dict(zip(header, row, strict=True))
    yield from bad.items()


def _parquet(path: str, columns: Columns, *_: Any) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = columns(file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1000, columns=names)
        for number, (batch, i) in enumerate(((table, i) for table in batches for i in range(len(table))), 1):
            try:
                yield number, {name: batch[name][i].as_py() for name in names}
            except ValueError as error:
                yield number, DataError(f"a value cannot be read ({error}); write text as UTF-8")


def _dataset(
    source: str, columns: Columns, split: str, config: str | None, streaming: bool
) -> Iterator[tuple[int, Any]]:
    """A folder written by `save_to_disk`, or what `load_dataset` reads: another folder, or a dataset on the Hub."""
    import datasets

    data: Any
    written = any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json"))
    if written:
        data = datasets.load_from_disk(source)
    else:
        path, _, named = (source, "", "") if os.path.isdir(source) else source.partition(":")
        how: Any = {"streaming": True} if streaming else {}
        data = datasets.load_dataset(path, *filter(None, [config or named]), split=split, **how)
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"there is no split {split!r}. Choose one of {list(data)}.")
        data = data[split]
    if data.column_names is not None:
        data = data.select_columns(columns(data.column_names))
    if isinstance(data, datasets.Dataset):
        data = data.with_format(None)
        data.data.validate(full=True)  # reading damaged columns would crash Python
    yield from enumerate(data, 1)


_READERS = {
    ".jsonl": (_jsonl, "line"), ".jsonl.gz": (_jsonl, "line"), ".json": (_json, "row"), ".csv": (_csv, "line"),
    ".parquet": (_parquet, "row"),
}  # fmt: skip
