"""Options from a YAML file and the command line: names and kinds are checked before anything is made of them."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from topd.errors import TOPDError
from topd.parsing import read_json, read_yaml

PROVENANCE = "provenance"
"""Entry of a run's `run.yaml` that is no option."""
SEVERAL = ("report_to",)
"""Options of text or a list of it, which take several values on the command line."""


def parse_options(argv: Sequence[str], kinds: Any, program: str) -> Any:
    """Options from `--config FILE.yaml` and the command line, which wins. Unknown options are named, with near ones.

    Args:
        kinds: dataclasses; one of each comes back.
        program: its name, for messages.

    Raises:
        TOPDError: an option that is unknown, of the wrong kind, or at odds with others.
    """
    from trl import TrlParser

    parser: Any = TrlParser(kinds, prog=program)

    def refuse(message: str) -> None:
        raise TOPDError(f"{message[:300]}. `{program} --help` lists all options.")

    parser.error = refuse  # argparse would print them all and exit
    for action in parser._actions:
        if action.dest in SEVERAL:
            action.nargs = "+"
    arguments, file_options = _file_options(argv)
    spellings = (spelling for action in parser._actions for spelling in action.option_strings)
    known = {spelling.lstrip("-").replace("-", "_") for spelling in spellings} | {"env"}
    for name in [*_names(arguments), *map(str, file_options)]:
        if name not in known:
            raise TOPDError(f"Unknown option {name!r:.80}.{_near(name, known)} `{program} --help` lists all.")
    for name, value in file_options.items():
        _check_kind(name, value, kinds)
    for text in [*(argument.partition("=")[2] or argument for argument in arguments), *file_options.values()]:
        _check_names_in_json(text)
    os.environ.update({name: str(value) for name, value in file_options.pop("env", {}).items()})
    try:
        parser.set_defaults_with_config(**file_options)
        return parser.parse_args_into_dataclasses(args=arguments)
    except TOPDError:
        raise
    except (ValueError, TypeError) as error:
        if left := re.search(r"not used by the HfArgumentParser: (.*)", str(error)):
            raise TOPDError(
                f"These words follow an option that takes one value: {left[1]:.200}. Put spaces in quotation marks; "
                "several values go into the YAML file, as a list."
            ) from error
        raise TOPDError(str(error)) from error
    except Exception as error:  # whatever a library makes of odd values
        raise TOPDError(
            f"These options cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check their "
            f"values; `{program} --help` says what each takes."
        ) from error


def _names(arguments: list[str]) -> list[str]:
    """Every option named on the command line."""
    return [argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]


def _file_options(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without `--config FILE`, and the options of the file; none if there is none.

    What a run has recorded of itself, under `provenance` in its `run.yaml`, is no option and is left out.
    """
    arguments = list(argv)
    if "--config" not in arguments:
        return arguments, {}
    position = arguments.index("--config")
    name = arguments[position + 1] if position + 1 < len(arguments) else "(nothing)"
    file = Path(name)
    if not file.is_file():
        raise TOPDError(f"--config {name}: there is no such file. Recipes are in recipes/.")
    try:
        config = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TOPDError(f"{file} is not valid YAML: {str(error)[:300]}") from error
    if not isinstance(config, dict):
        raise TOPDError(f"{file} must hold `option: value` lines.")
    config.pop(PROVENANCE, None)
    resume = config.get("resume_from_checkpoint")
    if isinstance(resume, bool):
        config["resume_from_checkpoint"] = str(resume).lower()  # the option is text: true, auto or a folder
    return [*arguments[:position], *arguments[position + 2 :]], config


def _check_names_in_json(text: Any) -> None:
    """Raise `TOPDError` where an option's JSON object has a name twice; other mistakes are the parser's to report."""
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return
    try:
        read_json(text)
    except json.JSONDecodeError:
        return
    except (ValueError, RecursionError) as error:
        raise TOPDError(f"{text[:60]}: {error}.") from error


def _check_kind(name: str, value: Any, kinds: Any) -> None:
    """A file's values go past argparse unless they are text."""
    if name == "env":
        if not isinstance(value, dict) or not all(re.fullmatch(r"\w+", str(key)) for key in value):
            raise TOPDError("env must hold `NAME: value` lines.")
        return
    hint: Any = next((hints[name] for kind in kinds if name in (hints := get_type_hints(kind))), Any)
    if isinstance(value, str) and "\0" not in value and not _is_text(hint):
        return  # argparse converts it
    if not _fits(value, hint):
        raise TOPDError(f"{name} is {value!r:.60}; write {_in_words(hint)}.")


def check_kinds(config: Any) -> None:
    """Raise `ValueError` where an option that holds text, a number or a truth value was given another kind of value."""
    hints = _hints(type(config))  # type: ignore[arg-type]
    for option in fields(config):
        value, hint = getattr(config, option.name), hints[option.name]
        if value is option.default or not _is_plain(hint) or (_is_text(hint) and isinstance(value, os.PathLike)):
            continue
        if get_origin(hint) is Literal and isinstance(value, str):
            continue  # the config says itself what is allowed
        if not _fits(value, hint):
            raise ValueError(f"{option.name} is {value!r:.60}; write {_in_words(hint)}.")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_plain(hint: Any) -> bool:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return all(part in (int, float, bool, str, type(None)) or get_origin(part) is Literal for part in parts)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63
    if hint is str:
        return isinstance(value, str) and "\0" not in value
    if hint is None or hint is type(None):
        return value is None
    kind = origin or hint
    if kind is list:
        parts = get_args(hint)
        return isinstance(value, list) and all(not parts or _fits(item, parts[0]) for item in value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _is_text(hint: Any) -> bool:
    """Whether text is what is wanted, so that nothing converts it."""
    return hint is str or str in get_args(hint)


def _in_words(hint: Any) -> str:
    """int | None is "a whole number or nothing"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing (null)",
             dict: "`name: value` lines", list: "a list"}  # fmt: skip
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = [
        ", ".join(map(str, get_args(part))) if get_origin(part) is Literal
        else names.get(get_origin(part) or part, getattr(part, "__name__", str(part)))
        for part in parts
    ]  # fmt: skip
    return " or ".join(words)


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f" Did you mean {' or '.join(f'--{option}' for option in near)}?" if near else ""
