"""Options that the commands share: their spelling, YAML files, prompts by name, how a run was started and resumes."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.cli.help import Page, show_help
from topd.cli.launch import is_launch_option, launch, split, typed_words
from topd.cli.names import known_name
from topd.cli.recipes import config_file
from topd.embedded.pair import PREFIX
from topd.errors import TOPDError
from topd.lm.pair import PREFIX as LM
from topd.loading.options import PROVENANCE, check_value, renamed, spelling
from topd.parsing import read_json, read_yaml
from topd.runs.guard import guarded
from topd.runs.sole_writer import sole_writer

if TYPE_CHECKING:
    from topd.runs.recorded import StartRecord

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


def option_names(kinds: Any) -> set[str]:
    """Names of the options of these dataclasses, with underscores, and `no_NAME` of those that are true by default."""
    options = [option for kind in kinds for option in fields(kind) if option.init]
    return {option.name for option in options} | {f"no_{option.name}" for option in options if option.default is True}


def run_training(argv: Sequence[str], page: Callable[[], Page], train: Any) -> int:
    """Print the help, if it is asked for; start the processes, if there are to be several; else train in this one.

    `page` is a function, since it imports TRL. `train` is called with the words of the command and an instance of each
    class of options, the output folder locked. Returns the exit status.
    """
    from topd.runs.checkpoints import check_writable
    from topd.runs.console import hide_progress_bars

    hide_progress_bars()
    shown = page()
    show_help(argv, shown)
    status = launch(shown.name, argv, read_config(argv)[1], option_names(shown.kinds) | {"config"})
    if status is not None:
        return status
    data, config, model = parse_options(argv, shown)
    check_writable(config)
    folder = Path(config.output_dir)
    with guarded(folder, remove=True), sole_writer(folder) if config.process_index == 0 else nullcontext():
        train((shown.name, *argv), data, config, model)
    return 0


def parse_options(argv: Sequence[str], page: Page) -> Any:
    """Options from `--config FILE.yaml` and the command line, which wins, by TRL's parser: one instance of each class.

    Options of accelerate's launcher are left out: see `topd.cli.launch`. Raises `TOPDError` if an option is unknown, of
    the wrong kind, or conflicts with others.
    """
    from trl import TrlParser

    kinds, program = page.kinds, f"topd {page.name}"
    parser: Any = TrlParser(kinds, prog=program, add_help=False)

    def refuse(message: str) -> None:
        raise TOPDError(f"{message[:300]}. `{program} --help-all` lists all options.")

    parser.error = refuse  # argparse would print all options and exit
    for action in parser._actions:
        if action.dest in SEVERAL:
            action.nargs = "+"
    known = option_names(kinds) | {"env"}

    def spell(name: str) -> str:
        return known_name(name, known, program)

    words, in_file = read_config(argv)
    words = respelled(split(words, known)[0], spell)
    ours = [name for name in in_file if not is_launch_option(str(name).replace("-", "_"), known)]
    in_file = renamed({name: in_file[name] for name in ours}, spell)
    for name, value in in_file.items():
        check_value(name, value, kinds)
    given = [*_given(words), *in_file.items()]
    for name, text in given:
        _check_json(name, text, kinds)
    names = [name for name, _ in given]
    lora = next((name for name in names if name.startswith("lora_")), None)
    if lora is not None and "use_peft" not in names:
        raise TOPDError(f"{lora} does nothing without use_peft: add --use_peft true, or leave it out.")
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
        if "bf16/gpu" in str(error):
            raise TOPDError("There is no GPU here. To train on the CPU, add --use_cpu true.") from error
        raise TOPDError(str(error)) from error
    except Exception as error:  # libraries raise many kinds of errors for odd values
        raise TOPDError(
            f"These options cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check their "
            f"values; `{program} --help-all` shows what each takes."
        ) from error


def read_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without `--config FILE` (or a first word FILE.yaml), and the options of the file, if one is named.

    The entry `provenance` of a run's `run.yaml` is not an option and is left out. Raises `TOPDError` if the file cannot
    be read, or several are named.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    first = [] if not argv or argv[0].startswith("-") else ["--config"]
    given, words = parser.parse_known_args([*first, *argv])
    names = given.config
    if not names:
        return words, {}
    if len(names) > 1:
        raise TOPDError(f"Several files with options: {', '.join(names):.200}. Give one.")
    file = config_file(names[0])
    try:
        config = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TOPDError(f"{file} is not valid YAML: {str(error)[:300]}") from error
    if not isinstance(config, dict):
        raise TOPDError(f"{file} must contain `option: value` lines.")
    config.pop(PROVENANCE, None)
    resume = config.get("resume_from_checkpoint")
    if isinstance(resume, bool):
        config["resume_from_checkpoint"] = str(resume).lower()  # the option is text: true, auto or a folder
    return words, config


def _given(words: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line whose value is one word, with it."""
    pairs = [(word[2:].partition("="), after) for word, after in zip(words, [*words[1:], ""], strict=False)
             if word.startswith("--")]  # fmt: skip
    return [(name, value if equals else after) for (name, equals, value), after in pairs]


def _check_json(name: str, text: Any, kinds: Any) -> None:
    """Raise `TOPDError` where an option's JSON object is broken or has a name twice."""
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return
    try:
        read_json(text)
    except json.JSONDecodeError as error:
        if any(name in getattr(kind, "_VALID_DICT_FIELDS", ()) for kind in kinds):
            raise TOPDError(f"--{name} is {text:.60}, which is not JSON: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise TOPDError(f"--{name}: {text[:60]}: {error}.") from error


def json_object(text: str) -> dict[str, Any]:
    """The value of an argument such as '{"enable_thinking": false}'."""
    try:
        value = read_json(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"write a JSON object, not {text[:60]!r} ({error})") from error
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
    if given:
        return given
    if models[0].startswith(LM):
        return "lm"
    if not embedded:
        raise TOPDError(
            f"Specify the prompts for {models[0]}: --data FILE.jsonl (or .json, .csv, .parquet, a Hub dataset; --data "
            "embedded is the embedded task)."
        )
    return "embedded-long" if any(name.startswith("long") for name in embedded) else "embedded"


EMBEDDED_PROMPTS = 4096
"""Of the embedded task, where nothing limits them."""


def prompts(
    source: Any, split: str, limit: int | None, responses: bool = False, also: Any = None, form: Any = None
) -> Any:
    """A dataset of prompts and answers, from a source or the embedded task; see `load_prompts`."""
    from topd.embedded.task import DATA, make_problems
    from topd.loading.rows import TEACHER_PROMPT

    if not isinstance(source, str) or source not in DATA:
        from topd.loading.data import PLAIN, load_prompts

        return load_prompts(source, split=split, limit=limit, responses=responses, also=also, form=form or PLAIN)
    from datasets import Dataset

    if responses:
        raise TOPDError("The embedded task has no given responses. Use a file that has them: --data FILE.jsonl.")
    if limit is not None and not 0 < limit <= MOST_EMBEDDED:
        raise TOPDError(f"data_limit is {limit}; the embedded task gives 1 to {MOST_EMBEDDED:,} prompts.")
    wanted = (*(also or ()), form and form.column)  # teacher prompts are optional
    absent = [f"column {name}" for name in wanted if name and name != TEACHER_PROMPT]
    absent += ["system prompt"] if form and form.system is not None else []
    if absent:
        raise TOPDError(f"The embedded task has no {absent[0]}. Use a file that has it: --data FILE.jsonl.")
    problems = make_problems(limit or EMBEDDED_PROMPTS, seed=0, held_out=False, level=DATA[source])
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])


# How a run is started, and where it resumes


def start_record(words: Sequence[str], *parts: Any) -> StartRecord:
    """How a command was started: every option, before defaults are filled in, and the words as typed."""
    from topd.runs.provenance import changed_options, command_line, options_of
    from topd.runs.recorded import StartRecord

    options = options_of(*parts)
    return StartRecord(options, changed_options(options, *parts), command_line(("topd", *typed_words(words))))


def resume_from(config: Any) -> str | bool | None:
    """The checkpoint to resume from: a named one, or True for the newest whole one; None to start from scratch.

    `auto` resumes if there is a whole checkpoint. The trainer compares checksums later. Raises `ResumeError` if there
    is no checkpoint; or the folder holds checkpoints and the option is not given, since the new run's would be mixed
    with them; or a trained model, which a new run would replace.
    """
    from topd.runs.checkpoints import AUTO, checkpoint_to_resume, newest_whole, refuse_second_run, refuse_to_overwrite

    wanted, folder = str(config.resume_from_checkpoint or "false"), Path(config.output_dir)
    if wanted.lower() == "false":
        refuse_second_run(folder)
    if wanted.lower() == "false" or (wanted.lower() == AUTO and newest_whole(folder)[0] is None):
        refuse_to_overwrite(folder)
        return None
    newest = wanted.lower() in ("true", AUTO)
    checkpoint, _ = checkpoint_to_resume(newest or wanted, folder, thorough=False)
    return newest or str(checkpoint)


def trained(
    kind: Any, names: str, config: Any, model: Any, record: StartRecord, resume: str | bool | None,
    teacher: Any, train_dataset: Any, eval_dataset: Any,
) -> tuple[Any, int]:  # fmt: skip
    """Load the models into a trainer of this kind and train; the trainer, and the step after which it resumed.

    `names`: of student and teacher, for messages; `teacher`: its name, names by their column, or None.
    """
    from trl import get_peft_config, get_quantization_config

    from topd.embedded.pair import resolve_model
    from topd.loading.by_name import SAFE, load_by_name
    from topd.loading.tokenizers import tokenizer_of
    from topd.runs.console import ConsoleCallback, loading

    student = model.model_name_or_path
    init = {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    config.model_init_kwargs = SAFE | init | {"revision": model.model_revision} | (config.model_init_kwargs or {})
    config.teacher_model_init_kwargs = init | (config.teacher_model_init_kwargs or {})
    lines = ConsoleCallback()
    with loading(names, config.process_index == 0):
        trainer = load_by_name(
            "models", names, kind, student, teacher_model=teacher, args=config, train_dataset=train_dataset,
            eval_dataset=eval_dataset, callbacks=[lines], peft_config=get_peft_config(model),
            processing_class=tokenizer_of(resolve_model(student), config.trust_remote_code, model.model_revision),
            quantization_config=get_quantization_config(model),
        )  # fmt: skip
    trainer.start_record = record
    trainer.train(resume_from_checkpoint=resume)
    return trainer, lines.first
