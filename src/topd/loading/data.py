"""Prompts for training, probing and evaluation: every row of a source is checked before anything starts.

Rows come from `readers`; which column of a row is the prompt, and its forms, is in `rows`.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from topd.errors import DataError
from topd.lm.pair import data_file
from topd.loading.readers import reader_of
from topd.loading.rows import TEACHER_PROMPT, DataForm

if TYPE_CHECKING:
    import datasets

Source = str | Sequence[str] | Mapping[str, float]
"""A file, folder, Hub name or pattern such as `part-*.jsonl`; several of them; or a mixture: each with its weight."""
Read = Callable[[object, str], Any]
"""Reads a value; the text names the value in its `DataError`."""
MIXTURE_SEED = 0
"""Of the order of a mixture, which the trainer shuffles again by its own seed."""
PLAIN = DataForm()


def load_prompts(
    source: Source, *, split: str = "train", limit: int | None = None, responses: bool = False,
    also: Mapping[str, Read] | None = None, form: DataForm = PLAIN,
) -> datasets.Dataset:  # fmt: skip
    """Prompts and answers from files, folders or the Hub, checked row by row.

    `source`: a .jsonl, .jsonl.gz, .json (a list of objects, or an object with one list), .csv or .parquet file; "lm",
    the prompts of the language-model pair; a folder written by `save_to_disk`, or one that `load_dataset` reads; or a
    Hub dataset, "owner/name" or "owner/name:configuration". A pattern names several files; a list of sources is read
    one after the other; a mapping from sources to weights draws from them at random in these shares until the first
    runs out, so that no row repeats. `split` picks a part of folders and Hub datasets (a file has no parts). `limit`:
    keep the first N rows; all are checked. `responses`: every row must have a `response` or `completion` (text), or end
    its conversation with the assistant's answer; it is returned as the column `response`. `also`: further columns, and
    the functions that read their values (None if a row has none). `form`: see `DataForm`.

    Returns the column `prompt` (text, or messages {"role", "content"}; one kind in all rows), `answer` if any row has
    one (text; None if missing or blank; a whole number is written without ".0"), and the columns of `also`. Raises
    `DataError`.
    """
    parts, also = _parts(source, limit), also or {}
    names = dict.fromkeys(name for part, _ in parts for name in part)
    rows = {name: _all_rows(name, split, responses, also, form) for name in names}
    _check_one_kind({name: loaded[0][0] for name, loaded in rows.items()})
    columns = ("prompt", "answer", "response", *also)
    empty = [each for i, each in enumerate(columns) if all(row[i] is None for row in chain(*rows.values()))]

    def dataset(name: str) -> datasets.Dataset:
        import datasets

        values = dict(zip(columns, zip(*rows[name], strict=True), strict=True))
        features = _features(rows[name][0][0])
        data = datasets.Dataset.from_dict({each: values[each] for each in features}, features=features)
        for each in also:
            data = data.add_column(each, list(values[each]))
        return data.remove_columns(empty)

    data = _mixed([([dataset(name) for name in names], weight) for names, weight in parts])
    return data if limit is None else data.select(range(min(limit, len(data))))


def stream_prompts(
    source: Source, *, split: str = "train", limit: int | None = None, also: Mapping[str, Read] | None = None,
    form: DataForm = PLAIN,
) -> datasets.IterableDataset:  # fmt: skip
    """The same rows as a stream, see `load_prompts`: read and checked when they are needed, never held in memory.

    The first row of each source is read at once. The columns are `prompt`, `answer` and those of `also`, as text.
    """
    import datasets

    parts, also = _parts(source, limit), dict(also or {})
    names = dict.fromkeys(name for part, _ in parts for name in part)
    first = {name: next(_rows(name, split, False, also, form, True))[1] for name in names}
    _check_one_kind({name: row[0] for name, row in first.items()})
    text = datasets.Value("string")
    features: Any = dict(_features(next(iter(first.values()))[0]))
    del features["response"]
    if all(dict(zip(also, row[3:], strict=True)).get(TEACHER_PROMPT) is None for row in first.values()):
        also |= {TEACHER_PROMPT: _refuse_later} if TEACHER_PROMPT in also else {}
    others = {name: features["prompt"] if name == TEACHER_PROMPT else text for name in also}
    others = {name: kind for name, kind in others.items() if also[name] is not _refuse_later}

    def stream(name: str) -> datasets.IterableDataset:
        given = {"name": name, "split": split, "also": also, "form": form}
        columns = datasets.Features(features | others)
        return datasets.IterableDataset.from_generator(_streamed, gen_kwargs=given, features=columns)

    data = _mixed([([stream(name) for name in names], weight) for names, weight in parts])
    return data if limit is None else data.take(limit)


def source_name(source: Source) -> str:
    """A source in words, for records and messages."""
    if isinstance(source, Mapping):
        return " + ".join(f"{weight:g} {name}" for name, weight in source.items())
    return source if isinstance(source, str) else " + ".join(source)


def _parts(source: Source, limit: int | None) -> list[tuple[list[str], float | None]]:
    """The sources by name, patterns expanded, each group with its weight."""
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DataError(f"limit is {limit!r}; it must be a whole number of at least 1, or None for all rows.")
    if isinstance(source, Mapping):
        for weight in source.values():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise DataError(f"{str(dict(source))[:200]}: weights must be positive numbers; got {weight!r}.")
        if source:
            return [(_expanded(name), float(weight)) for name, weight in source.items()]
    names = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not names:
        raise DataError("no data source is given. Pass at least one file.")
    return [([each for name in names for each in _expanded(name)], None)]


def _expanded(name: str) -> list[str]:
    """The files that a pattern names, in order; "lm", the pair's prompts; other names as they are."""
    name = data_file(os.fspath(name))
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    files = sorted(filter(os.path.isfile, glob.iglob(name, recursive=True))) if "\0" not in name else []
    if not files:
        raise DataError(f"{name!r}: no file fits this pattern. Patterns are relative to the current folder.")
    return files


def _mixed(groups: list[tuple[list[Any], float | None]]) -> Any:
    """One after the other within a group; the groups by their weights."""
    import datasets

    whole = [group[0] if len(group) == 1 else datasets.concatenate_datasets(group) for group, _ in groups]
    weights = [weight for _, weight in groups if weight is not None]
    if len(whole) == 1 or not weights:
        return whole[0]
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(whole, shares, seed=MIXTURE_SEED, stopping_strategy="first_exhausted")


def _check_one_kind(prompts: Mapping[str, Any]) -> None:
    """Raise `DataError` if some sources have text and others conversations."""
    kinds = {isinstance(prompt, str): name for name, prompt in prompts.items()}
    if len(kinds) > 1:
        raise DataError(f"{kinds[True]!r} has text and {kinds[False]!r} conversations; use one kind in all sources.")


def _features(prompt: Any) -> datasets.Features:
    import datasets

    text = datasets.Value("string")
    features: Any = {"prompt": text if isinstance(prompt, str) else datasets.List({"role": text, "content": text})}
    return datasets.Features(features | {"answer": text, "response": text})


def _rows(
    source: str, split: str, responses: bool, also: Mapping[str, Read], form: DataForm, streaming: bool
) -> Iterator[tuple[str, Any]]:
    """Place and values of each row: (prompt, answer, response, further columns). Errors name the source.

    While streaming, a broken row ends it; otherwise it is yielded as a `DataError`.
    """
    source, remedy = os.fspath(source), "Check the permissions."
    try:
        (reader, place, remedy), first = reader_of(source), None
        given = reader(source, lambda found: form.columns(found, also), split, form.config, streaming)
        for number, row in given:
            try:
                if isinstance(row, DataError):
                    raise row
                if not isinstance(row, dict):
                    raise DataError(f"{row!r:.40} is not an object with `prompt`")
                column = form.columns(list(row))[0]
                prompt, answer, response = form.read(row, column, responses)
                kind = f"`{column}` is {'text' if isinstance(prompt, str) else 'a conversation'}"
                first = first or (kind, f"{place} {number}")
                if kind != first[0]:
                    raise DataError(f"{kind}, but in {first[1]} {first[0]}; use one kind in all rows")
                others = [read(row.get(name), f"the {name}") for name, read in also.items()]
                own = dict(zip(also, others, strict=True)).get(TEACHER_PROMPT)
                if own is not None and isinstance(own, str) != isinstance(prompt, str):
                    raise DataError(f"`{column}` and `{TEACHER_PROMPT}` are text and a conversation; use one kind")
                yield f"{place} {number}", (prompt, answer, response, *others)
            except DataError as error:
                if streaming:
                    raise DataError(f"{place} {number}: {error}") from None
                yield f"{place} {number}", error
        if first is None and streaming:
            raise DataError("there are no rows. Write at least one, with a `prompt`.")
    except DataError as error:
        raise DataError(f"{source!r}: {error}") from None
    except Exception as error:  # from a library, the disk or the network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{source!r}: cannot be read ({reason}). {remedy}") from error


def _all_rows(
    source: str, split: str, responses: bool, also: Mapping[str, Read], form: DataForm
) -> list[tuple[Any, ...]]:
    """All rows of a source; or a `DataError` that lists the broken ones."""
    good, broken = [], []
    for place, row in _rows(source, split, responses, also, form, False):
        if isinstance(row, DataError):
            broken.append((int(place.split()[1]), f"  {place}: {row}"))
        else:
            good.append(row)
    if broken:
        listed = [text for _, text in sorted(broken)[:5]] + [f"  and {len(broken) - 5} more"] * (len(broken) > 5)
        what = f"broken rows: {len(broken)}; nothing was loaded. Fix or remove:"
        raise DataError("\n".join([f"{os.fspath(source)!r}: {what}", *listed]))
    if not good:
        raise DataError(f"{os.fspath(source)!r}: there are no rows. Write at least one, with a `prompt`.")
    return good


def _streamed(name: str, split: str, also: Mapping[str, Read], form: DataForm) -> Iterator[dict[str, Any]]:
    """The rows of a source for a stream."""
    for _, (prompt, answer, _, *others) in _rows(name, split, False, also, form, True):
        given = {each: value for each, value in zip(also, others, strict=True) if also[each] is not _refuse_later}
        yield {"prompt": prompt, "answer": answer} | given


def _refuse_later(value: object, what: str) -> None:
    """Reads the column of a stream that is left out because its first row has no value."""
    if value is not None:
        raise DataError(f"{what} is given, but not in the first row; give every row one, or none")
