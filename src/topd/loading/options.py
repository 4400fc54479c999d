"""Option names as people write them, and whether values have the kind that an option takes."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from topd.errors import TOPDError

PROVENANCE = "provenance"
"""Entry of a run's `run.yaml` that is no option."""
SYNONYMS = (
    ("model_name_or_path", "student"), ("teacher_model_name_or_path", "teacher"), ("data", "dataset_name"),
    ("data_config", "dataset_config"), ("data_split", "split", "dataset_train_split"), ("data_limit", "limit"),
    ("data_streaming", "streaming", "dataset_streaming"), ("max_completion_length", "max_new_tokens"),
    ("candidate_share", "share"), ("ground_cost", "cost"), ("output_dir", "out"),
)  # fmt: skip
"""Names of one option: TRL's, and a short one. Every command accepts both."""
_hints: Any = cache(get_type_hints)


def spelling(name: str, known: Collection[str], synonyms: bool = True) -> str:
    """The known spelling of an option: with underscores or hyphens, or a synonym; the name itself if it is unknown."""
    plain = name.replace("-", "_")
    others = next((group for group in SYNONYMS if plain in group), ()) if synonyms else ()
    for each in (plain, *others):
        for spelled in (each, each.replace("_", "-")):
            if spelled in known:
                return spelled
    return name


def renamed(options: Mapping[Any, Any], spell: Callable[[str], str]) -> dict[str, Any]:
    """The options of a file under the names that `spell` returns. Raises `TOPDError` if two are the same option."""
    found: dict[str, Any] = {}
    written: dict[str, str] = {}
    for name, value in options.items():
        spelled = spell(str(name))
        if spelled in found:
            raise TOPDError(f"{written[spelled]} and {name} are the same option: keep one.")
        found[spelled], written[spelled] = value, str(name)
    return found


def check_value(name: str, value: Any, kinds: Any) -> None:
    """Raise `TOPDError` where a file's value has the wrong kind: only text passes through argparse."""
    if name == "env":
        if not isinstance(value, dict) or not all(re.fullmatch(r"\w+", str(key)) for key in value):
            raise TOPDError("env must contain `NAME: value` lines.")
        return
    hint: Any = next((hints[name] for kind in kinds if name in (hints := _hints(kind))), Any)
    if isinstance(value, str) and "\0" not in value and not _is_text(hint):
        return  # argparse converts it
    if not _fits(value, hint):
        raise TOPDError(f"{name} is {value!r:.60}; write {_in_words(hint)}.")


def check_kinds(config: Any) -> None:
    """Raise `ValueError` where a config's option of text, a number or a truth value has another kind of value.

    Text such as 2e-6 becomes a number: PyYAML reads it as text.
    """
    hints = _hints(type(config))
    plain = (int, float, bool, str, type(None))
    for option in fields(config):
        value, hint = getattr(config, option.name), hints[option.name]
        simple = all(part in plain or get_origin(part) is Literal for part in _parts(hint))
        if value is option.default or not simple or (_is_text(hint) and isinstance(value, os.PathLike)):
            continue
        if isinstance(value, str) and float in _parts(hint) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            value = float(value)
            setattr(config, option.name, value)
        if get_origin(hint) is Literal and isinstance(value, str):
            continue  # the config checks its choices itself
        if not _fits(value, hint):
            raise ValueError(f"{option.name} is {value!r:.60}; write {_in_words(hint)}.")


def check_objects(config: Any) -> None:
    """Raise `ValueError` where a config's option of `name: value` lines is text that is no JSON object."""
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str) and value:
            raise ValueError(f"{name} must be `name: value` lines or a JSON object; got {value!r}.")


def rename_dtype(config: Any) -> None:
    """Rename `torch_dtype` to `dtype` in a config's keyword arguments of `from_pretrained`: TRL ignores the old name.

    As in transformers, `dtype` wins if both are given.
    """
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        given = dict(getattr(config, name) or {})
        if "torch_dtype" in given:
            setattr(config, name, {"dtype": given.pop("torch_dtype")} | given)


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_text(hint: Any) -> bool:
    """Whether text is among the kinds, so that nothing converts it."""
    return hint is str or str in get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    parts = _parts(hint)
    kind: Any = get_origin(hint) or hint
    if len(parts) > 1:
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return value in get_args(hint)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and (kind is float or abs(int(value)) < 2**63)
    if kind is str:
        return isinstance(value, str) and "\0" not in value
    if kind is list and isinstance(value, list):
        return all(_fits(item, each) for each in get_args(hint) for item in value)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _in_words(hint: Any) -> str:
    """int | None is "a whole number or nothing"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing (null)",
             dict: "`name: value` lines", list: "a list"}  # fmt: skip
    words = [
        ", ".join(map(str, get_args(part))) if get_origin(part) is Literal
        else names.get(get_origin(part) or part, getattr(part, "__name__", str(part)))
        for part in _parts(hint)
    ]  # fmt: skip
    return " or ".join(words)
