"""`topd train`: models, data and options from a YAML file and the command line, then `TOPDTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.demo.pair import PREFIX
from topd.errors import TOPDError
from topd.guard import guarded
from topd.quiet import quieten_bars
from topd.sole_writer import sole_writer
from topd.training.options import parse_options
from topd.training.output_folder import AUTO, check_writable, refuse_second_run
from topd.training.provenance import changed_options, command_line, options_of
from topd.training.recorded import Started


@dataclass
class DataArguments:
    """Where prompts come from."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Training prompts: a JSONL, JSON, CSV or Parquet file with a column `prompt` (text or messages) "
            "and optionally `answer`; the name of a Hub dataset; or `embedded` or `embedded-long`, the embedded task. "
            "Default: that of an embedded model; otherwise it must be given."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    data_limit: int | None = field(default=None, metadata={"help": "Use only the first so many prompts."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Prompts for the evaluation loss, named as in `data`."}
    )
    preflight: bool = field(
        default=True,
        metadata={"help": "Check pair, data and machine before training (the quick part of topd check); errors stop."},
    )


EMBEDDED_PROMPTS = 4096
"""Prompts drawn from the embedded task where `data_limit` does not say."""

MOST_EMBEDDED = 100_000
"""There are some millions of problems; drawing most of them without repeats would take long."""


def run(argv: Sequence[str], before: Callable[..., None] | None = None) -> None:
    """Parse, load, train, save. Raises `TOPDError` for everything that the user can mend.

    Args:
        before: checks on what `parse` returned and the prompts, before any weights are loaded; it raises.
    """
    quieten_bars()
    data, config, model = parse(argv)
    check_writable(config)
    folder = Path(config.output_dir)
    with guarded(folder), sole_writer(folder) if config.process_index == 0 else nullcontext():
        _run(("train", *argv), data, config, model, before)


def started(words: Sequence[str], *parts: Any) -> Started:
    """How a command was started: every option, before anything is filled in, and the words as they were typed."""
    options = options_of(*parts)
    return Started(options, changed_options(options, *parts), command_line(("topd", *words)))


def _run(
    words: Sequence[str], data: DataArguments, config: Any, model: Any, before: Callable[..., None] | None
) -> None:
    from trl import get_peft_config, get_quantization_config

    from topd.data import read_text
    from topd.demo.pair import resolve_model
    from topd.training.checkpoints import saving
    from topd.training.console import speak
    from topd.training.several_teachers import COLUMN, MOPDTrainer
    from topd.training.summary import places, print_summary
    from topd.training.tokenizers import tokenizer_of
    from topd.training.trainer import TOPDTrainer

    student, teachers = named(config, model)
    teacher_name = next(iter(teachers.values()), None)
    kind, teacher = (MOPDTrainer, teachers) if config.teachers else (TOPDTrainer, teacher_name)
    also = {COLUMN: read_text} if config.teachers else None
    data.data = data_source(data.data, student, *teachers.values())
    begun = started(words, data, config, model)
    train_dataset = prompts(data.data, data.data_split, data.data_limit, also=also)
    eval_dataset = prompts(data.eval_data, data.data_split, data.data_limit) if data.eval_data else None
    resume = resume_from(config)
    if before is not None and data.preflight:
        before(data, config, model, train_dataset, eval_dataset)

    tokenizer = tokenizer_of(resolve_model(student), config.trust_remote_code, model.model_revision)
    init = {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    config.model_init_kwargs = init | {"revision": model.model_revision} | (config.model_init_kwargs or {})
    config.teacher_model_init_kwargs = init | (config.teacher_model_init_kwargs or {})
    trainer = loading(
        "models", f"{student} and {teacher_name or 'the teacher'}", kind,
        teacher_model=teacher, args=config, train_dataset=train_dataset, eval_dataset=eval_dataset,
        processing_class=tokenizer, peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )  # fmt: skip
    trainer.started = begun
    lines = speak(trainer)
    trainer.train(resume_from_checkpoint=resume)
    with saving(f"The trained model in {config.output_dir}", Path(config.output_dir)):
        trainer.save_model(config.output_dir)
        trainer.save_state()  # for topd report
        trainer.create_model_card(model_name=Path(config.output_dir).name)
    if trainer.is_world_process_zero():
        where = places(Path(config.output_dir))
        print_summary(trainer.state.log_history, where, trainer.state.global_step, lines.first)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.data)
    trainer.end()


def named(config: Any, model: Any) -> tuple[str, dict[str, str]]:
    """The student, and the teachers by their names in the data (one has the name ""); none, if it is on a server."""
    one = {"": config.teacher_model_name_or_path} if config.teacher_model_name_or_path else {}
    teachers = dict(config.teachers or {}) or one
    if not model.model_name_or_path or not (teachers or config.teacher_window_server):
        raise TOPDError(
            "Name the student and the teacher: --model_name_or_path and --teacher_model_name_or_path (a folder, a Hub "
            "name, or embedded:long-student and embedded:long-teacher), or --config recipes/embedded.yaml. (A teacher "
            "on a server alone: --teacher_window_server.)"
        )
    from topd.training.loaded import check_whole

    check_whole("student", model.model_name_or_path)
    for teacher in teachers.values():
        check_whole("teacher", teacher)
    return model.model_name_or_path, teachers


def data_source(given: str | None, *models: str) -> str:
    """Where the prompts come from. If nothing is given, embedded models have the embedded task, others have nothing."""
    embedded = [model.removeprefix(PREFIX) for model in models if model.startswith(PREFIX)]
    if given is None and not embedded:
        raise TOPDError(
            f"Name the prompts for {models[0]}: --data FILE.jsonl (or .json, .csv, .parquet, a Hub dataset; --data "
            "embedded is the embedded task)."
        )
    return given or ("embedded-long" if any(name.startswith("long") for name in embedded) else "embedded")


def parse(argv: Sequence[str]) -> tuple[DataArguments, Any, Any]:
    """The options of `topd train`."""
    from trl import ModelConfig

    from topd.training.config import TOPDConfig

    parsed: tuple[DataArguments, Any, Any] = parse_options(argv, (DataArguments, TOPDConfig, ModelConfig), "topd train")
    return parsed


def prompts(source: str, split: str, limit: int | None, responses: bool = False, also: Any = None) -> Any:
    """A dataset of prompts (and answers, given responses, columns as `also` reads them), or the embedded task's."""
    from topd.demo.task import DATA

    if responses and source in DATA:
        raise TOPDError("The embedded task has no given responses. Name a file that has: --data FILE.jsonl.")
    if source in DATA:
        from datasets import Dataset

        from topd.demo.task import make_problems

        if limit is not None and not 0 < limit <= MOST_EMBEDDED:
            raise TOPDError(f"data_limit is {limit}; the embedded task gives 1 to {MOST_EMBEDDED:,} prompts.")
        if also:
            raise TOPDError(
                f"The embedded task has no column {', '.join(also)}. Name a file that has: --data FILE.jsonl."
            )
        problems = make_problems(limit or EMBEDDED_PROMPTS, seed=0, held_out=False, level=DATA[source])
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
    except RuntimeError as error:
        if "to be installed" not in str(error):  # of a tracker; transformers' own words say how
            raise
        raise TOPDError(f"{error} Or leave it out of --report_to.") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise TOPDError(
                f"{name} brings code of its own, which was not run. Read it; if you trust it, --trust_remote_code true."
            ) from error
        if what == "models" and isinstance(error, ValueError):  # TRL's own words say what to do
            raise TOPDError(str(error)) from error
        reason = str(error).strip().splitlines()[0]
        raise TOPDError(
            f"Cannot load the {what} of {name}: {reason} Give a folder that holds one, or a Hub name (and be online); "
            "embedded:long-student and embedded:long-teacher are always there."
        ) from error


def resume_from(config: Any) -> str | bool | None:
    """Where to go on: the checkpoint that is named, or True for the newest whole one, if there is one at first sight.

    With `auto` too, if there is one. Checksums are compared later, by the trainer.

    Raises:
        ResumeError: there is none; or the folder holds checkpoints and the option is not given, since the new run's
            would be mixed with them.
    """
    from topd.training.checkpoints import checkpoint_to_resume, newest_whole

    wanted, folder = str(config.resume_from_checkpoint or "false"), Path(config.output_dir)
    if wanted.lower() == "false":
        refuse_second_run(folder)
        return None
    if wanted.lower() == AUTO and newest_whole(folder)[0] is None:
        return None
    newest = wanted.lower() in ("true", AUTO)
    checkpoint, _ = checkpoint_to_resume(newest or wanted, folder, thorough=False)
    return newest or str(checkpoint)
