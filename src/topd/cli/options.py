"""Options that the commands share: their spelling, YAML files, prompts by name, how a run was started and resumes."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.embedded.pair import PREFIX
from topd.errors import TOPDError
from topd.lm.pair import PREFIX as LM
from topd.loading.options import PROVENANCE, check_value, renamed, spelling

if TYPE_CHECKING:
    from topd.runs.recorded import StartRecord

EMBEDDED_PROMPTS = 4096
"""Prompts drawn from the embedded task where `data_limit` is not given."""
MOST_EMBEDDED = 100_000
"""There are some millions of problems; drawing most of them without repeats would take long."""
SEVERAL = ("report_to", "data", "eval_data")
"""Options of text or a list of it, which take several values on the command line."""


# The parsers


class Parser(argparse.ArgumentParser):
    """Accepts hyphens and underscores in option names alike, and the synonyms of `topd.loading.options`."""

    synonyms = True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = {option[2:] for option in self._option_string_actions if option.startswith("--")}

        def spell(name: str) -> str:
            found = spelling(name, known, self.synonyms)
            return found if found in known else name.replace("_", "-")

        return super().parse_known_args(respelled(sys.argv[1:] if args is None else args, spell), namespace)


def respelled(words: Sequence[str], spell: Any) -> list[str]:
    """A command line with every option name (without its dashes) replaced by what `spell` returns for it."""
    found = []
    for word in words:
        name, equals, value = word[2:].partition("=")
        found.append(f"--{spell(name)}{equals}{value}" if word.startswith("--") and name else word)
    return found


def parse_options(argv: Sequence[str], kinds: Any, program: str) -> Any:
    """Options from `--config FILE.yaml` and the command line, which wins, by TRL's parser.

    Args:
        kinds: dataclasses; one instance of each is returned.
        program: its name, for messages.

    Raises:
        TOPDError: an option is unknown (the message suggests close names), of the wrong kind, or conflicts with others.
    """
    from trl import TrlParser

    parser: Any = TrlParser(kinds, prog=program)

    def refuse(message: str) -> None:
        raise TOPDError(f"{message[:300]}. `{program} --help` lists all options.")

    parser.error = refuse  # argparse would print all options and exit
    for action in parser._actions:
        if action.dest in SEVERAL:
            action.nargs = "+"
    known = {option.lstrip("-").replace("-", "_") for action in parser._actions for option in action.option_strings}
    known.add("env")

    def spell(name: str) -> str:
        found = spelling(name, known)
        if found not in known:
            raise TOPDError(f"Unknown option {name!r:.80}.{_close(name, known)} `{program} --help` lists all.")
        return found

    words, in_file = _read_config(argv)
    words, in_file = respelled(words, spell), renamed(in_file, spell)
    for name, value in in_file.items():
        check_value(name, value, kinds)
    for text in [*(word.partition("=")[2] or word for word in words), *in_file.values()]:
        _check_json_names(text)
    os.environ.update({name: str(value) for name, value in in_file.pop("env", {}).items()})
    try:
        parser.set_defaults_with_config(**in_file)
        return parser.parse_args_into_dataclasses(args=words)
    except TOPDError:
        raise
    except (ValueError, TypeError) as error:
        if left := re.search(r"not used by the HfArgumentParser: (.*)", str(error)):
            raise TOPDError(
                f"These words follow an option that takes one value: {left[1]:.200}. Put a value with spaces in "
                "quotation marks; write several values as a list into the YAML file."
            ) from error
        raise TOPDError(str(error)) from error
    except Exception as error:  # libraries raise many kinds of errors for odd values
        raise TOPDError(
            f"These options cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check their "
            f"values; `{program} --help` shows what each takes."
        ) from error


def _read_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without `--config FILE`, and the options of the file; none if there is none.

    The entry `provenance` of a run's `run.yaml` is not an option and is left out.
    """
    from topd.parsing import read_yaml

    words = list(argv)
    if "--config" not in words:
        return words, {}
    position = words.index("--config")
    name = words[position + 1] if position + 1 < len(words) else "(nothing)"
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
    return [*words[:position], *words[position + 2 :]], config


def _check_json_names(text: Any) -> None:
    """Raise `TOPDError` where an option's JSON object has a name twice; the parser reports other mistakes."""
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return
    from topd.parsing import read_json

    try:
        read_json(text)
    except json.JSONDecodeError:
        return
    except (ValueError, RecursionError) as error:
        raise TOPDError(f"{text[:60]}: {error}.") from error


def _close(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=3)
    return f" Did you mean {' or '.join(f'--{option}' for option in close)}?" if close else ""


def json_object(text: str) -> dict[str, Any]:
    """The value of an argument such as '{"enable_thinking": false}'."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"write a JSON object, not {text[:60]!r}")
    return value


def check_at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Raise `TOPDError` where one of these options is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TOPDError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")


# Prompts


def data_source(given: Any, *models: str) -> Any:
    """Where the prompts come from. Embedded models and `lm:` models have a task of their own; others no default."""
    embedded = [model.removeprefix(PREFIX) for model in models if model.startswith(PREFIX)]
    if given is None and not embedded and not models[0].startswith(LM):
        raise TOPDError(
            f"Name the prompts for {models[0]}: --data FILE.jsonl (or .json, .csv, .parquet, a Hub dataset; --data "
            "embedded is the embedded task)."
        )
    if given is None and models[0].startswith(LM):
        return "lm"
    return given or ("embedded-long" if any(name.startswith("long") for name in embedded) else "embedded")


def prompts(
    source: Any, split: str, limit: int | None, responses: bool = False, also: Any = None, form: Any = None
) -> Any:
    """A dataset of prompts and answers, from a source or the embedded task; see `load_prompts`."""
    from topd.embedded.task import DATA, make_problems

    if not isinstance(source, str) or source not in DATA:
        from topd.loading.data import PLAIN, load_prompts

        return load_prompts(source, split=split, limit=limit, responses=responses, also=also, form=form or PLAIN)
    from datasets import Dataset

    if responses:
        raise TOPDError("The embedded task has no given responses. Name a file that has them: --data FILE.jsonl.")
    if limit is not None and not 0 < limit <= MOST_EMBEDDED:
        raise TOPDError(f"data_limit is {limit}; the embedded task gives 1 to {MOST_EMBEDDED:,} prompts.")
    absent = [f"column {name}" for name in (*(also or ()), form and form.column) if name]
    absent += ["system prompt"] if form and form.system is not None else []
    if absent:
        raise TOPDError(f"The embedded task has no {absent[0]}. Name a file that has it: --data FILE.jsonl.")
    problems = make_problems(limit or EMBEDDED_PROMPTS, seed=0, held_out=False, level=DATA[source])
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])


# How a run was started, and where it resumes


def start_record(words: Sequence[str], *parts: Any) -> StartRecord:
    """How a command was started: every option, before defaults are filled in, and the words as typed."""
    from topd.runs.provenance import changed_options, command_line, options_of
    from topd.runs.recorded import StartRecord

    options = options_of(*parts)
    return StartRecord(options, changed_options(options, *parts), command_line(("topd", *words)))


def resume_from(config: Any) -> str | bool | None:
    """The checkpoint to resume from: a named one, or True for the newest whole one; None to start from scratch.

    `auto` resumes if there is a whole checkpoint. The trainer compares checksums later.

    Raises:
        ResumeError: there is no checkpoint; or the folder holds checkpoints and the option is not given, since the new
            run's checkpoints would be mixed with them.
    """
    from topd.runs.checkpoints import AUTO, checkpoint_to_resume, newest_whole, refuse_second_run

    wanted, folder = str(config.resume_from_checkpoint or "false"), Path(config.output_dir)
    if wanted.lower() == "false":
        refuse_second_run(folder)
        return None
    if wanted.lower() == AUTO and newest_whole(folder)[0] is None:
        return None
    newest = wanted.lower() in ("true", AUTO)
    checkpoint, _ = checkpoint_to_resume(newest or wanted, folder, thorough=False)
    return newest or str(checkpoint)
