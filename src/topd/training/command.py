"""`topd train`: models, data and options from a YAML file and the command line, then `TOPDTrainer`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.errors import TOPDError


@dataclass
class DataArguments:
    """Where prompts come from."""

    data: str = field(
        default="embedded",
        metadata={
            "help": "Training prompts: a JSONL, JSON, CSV or Parquet file with a column `prompt` (text or messages) "
            "and optionally `answer`; the name of a Hub dataset; or `embedded`, the embedded task."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    data_limit: int | None = field(default=None, metadata={"help": "Use only the first so many prompts."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Prompts for the evaluation loss, named as in `data`."}
    )


EMBEDDED_PROMPTS = 4096
"""Prompts drawn from the embedded task where `data_limit` does not say."""


def run(argv: Sequence[str]) -> None:
    """Parse, load, train, save. Raises `TOPDError` for everything that the user can mend."""
    data, config, model = parse(argv)
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from topd.data import read_text
    from topd.demo.pair import resolve_model
    from topd.training.several_teachers import COLUMN, MOPDTrainer
    from topd.training.tokenizers import check_tokenizers
    from topd.training.trainer import TOPDTrainer

    several = {name: resolve_model(named) for name, named in (config.teachers or {}).items()}
    named = config.teacher_model_name_or_path or config.teacher_window_server or several
    if not model.model_name_or_path or not named:
        raise TOPDError(
            "Name the student and the teacher: --model_name_or_path and --teacher_model_name_or_path (a folder, a Hub "
            "name, or embedded:student-standard and embedded:teacher), or --config recipes/embedded.yaml. (A teacher "
            "on a server alone: --teacher_window_server.)"
        )
    student_name = resolve_model(model.model_name_or_path)
    teacher = resolve_model(config.teacher_model_name_or_path) if config.teacher_model_name_or_path else None
    teacher_name = next(iter(several.values()), teacher)
    also = {COLUMN: read_text} if several else None
    train_dataset = prompts(data.data, data.data_split, data.data_limit, also=also)
    eval_dataset = prompts(data.eval_data, data.data_split, data.data_limit) if data.eval_data else None

    trust = config.trust_remote_code
    tokenizer = loading("tokenizer", student_name, AutoTokenizer.from_pretrained, trust_remote_code=trust)
    if teacher_name is not None:
        teacher_tokenizer = loading("tokenizer", teacher_name, AutoTokenizer.from_pretrained, trust_remote_code=trust)
        check_tokenizers(tokenizer, teacher_tokenizer)
    init = {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    config.model_init_kwargs = init | {"revision": model.model_revision} | (config.model_init_kwargs or {})
    config.teacher_model_init_kwargs = init | (config.teacher_model_init_kwargs or {})
    trainer = loading(
        "models", f"{student_name} and {teacher_name or 'the teacher'}", MOPDTrainer if several else TOPDTrainer,
        teacher_model=several or teacher_name, args=config, train_dataset=train_dataset, eval_dataset=eval_dataset,
        processing_class=tokenizer, peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume_from(config))
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"Model saved in {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.data)
    trainer.end()


def parse(argv: Sequence[str]) -> tuple[DataArguments, Any, Any]:
    """The options of `topd train`."""
    from trl import ModelConfig

    from topd.training.config import TOPDConfig

    return parse_options(argv, (DataArguments, TOPDConfig, ModelConfig), "topd train")


def parse_options(argv: Sequence[str], types: Any, program: str) -> Any:
    """Options from `--config FILE.yaml` and the command line, which wins. Unknown options are named, with near ones.

    Args:
        types: dataclasses; one of each comes back.
    """
    from trl import TrlParser

    parser = TrlParser(types, prog=program)
    arguments = list(argv)
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments) or not Path(arguments[position]).is_file():
            missing = arguments[position] if position < len(arguments) else "(nothing)"
            raise TOPDError(f"--config {missing}: there is no such file. Recipes are in recipes/.")
    spellings = (spelling for action in parser._actions for spelling in action.option_strings)
    known = {spelling.lstrip("-").replace("-", "_") for spelling in spellings} | {"config", "env"}
    for name in _option_names(arguments):
        if name not in known:
            raise TOPDError(f"Unknown option {name}.{_near(name, known)} `{program} --help` lists all.")
    try:
        return parser.parse_args_and_config(arguments)
    except (ValueError, TypeError) as error:
        raise TOPDError(str(error)) from error


def _option_names(arguments: list[str]) -> list[str]:
    """Every option named on the command line and in the config file."""
    import yaml

    names = [argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    if "--config" not in arguments:
        return names
    file = Path(arguments[arguments.index("--config") + 1])
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TOPDError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise TOPDError(f"{file} must hold `option: value` lines.")
    return [*names, *(str(name) for name in config)]


def prompts(source: str, split: str, limit: int | None, responses: bool = False, also: Any = None) -> Any:
    """A dataset of prompts (and answers, given responses, columns as `also` reads them), or the embedded task's."""
    if responses and source == "embedded":
        raise TOPDError("The embedded task has no given responses. Name a file that has: --data FILE.jsonl.")
    if source == "embedded":
        from datasets import Dataset

        from topd.demo.task import make_problems

        if also:
            raise TOPDError(
                f"The embedded task has no column {', '.join(also)}. Name a file that has: --data FILE.jsonl."
            )
        problems = make_problems(limit or EMBEDDED_PROMPTS, seed=0, held_out=False)
        return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])
    from topd.data import load_prompts

    return load_prompts(source, split=split, limit=limit, responses=responses, also=also)


def loading(what: str, name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Load something by name; a failure to find it ends in a message."""
    first = args or ((name,) if what == "tokenizer" else (name.split(" and ")[0],))
    try:
        return load(*first, **kwargs)
    except TOPDError:
        raise
    except (OSError, ValueError) as error:
        if what == "models" and isinstance(error, ValueError):  # TRL's own words say what to do
            raise TOPDError(str(error)) from error
        reason = str(error).strip().splitlines()[0]
        raise TOPDError(
            f"Cannot load the {what} of {name}: {reason} Give a folder that holds one, or a Hub name (and be online); "
            "embedded:student-standard and embedded:teacher are always there."
        ) from error


def resume_from(config: Any) -> Any:
    """`--resume_from_checkpoint true` means the last checkpoint of the output folder."""
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not Path(wanted).is_dir():
            raise TOPDError(f"--resume_from_checkpoint {wanted}: there is no such folder.")
        return wanted
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    if last is None:
        raise TOPDError(
            f"There is no checkpoint in {config.output_dir} to resume from; leave --resume_from_checkpoint out."
        )
    return last


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f" Did you mean {' or '.join(f'--{option}' for option in near)}?" if near else ""
