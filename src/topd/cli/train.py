"""`topd train`: models, data and options from a YAML file and the command line, then `TOPDTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.cli.arguments import data_source, prompts, resume_from, started
from topd.errors import TOPDError
from topd.loading.options import parse_options
from topd.runs.guard import guarded
from topd.runs.output_folder import check_writable
from topd.runs.quiet import quieten_bars
from topd.runs.sole_writer import sole_writer


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


def _run(
    words: Sequence[str], data: DataArguments, config: Any, model: Any, before: Callable[..., None] | None
) -> None:
    from trl import get_peft_config, get_quantization_config

    from topd.embedded.pair import resolve_model
    from topd.loading.by_name import load_by_name
    from topd.loading.data import read_text
    from topd.loading.tokenizers import tokenizer_of
    from topd.runs.checkpoints import saving
    from topd.runs.console import speak
    from topd.runs.summary import places, print_summary
    from topd.training.several_teachers import COLUMN, MOPDTrainer
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
    trainer = load_by_name(
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
    from topd.loading.models import check_whole

    check_whole("student", model.model_name_or_path)
    for teacher in teachers.values():
        check_whole("teacher", teacher)
    return model.model_name_or_path, teachers


def parse(argv: Sequence[str]) -> tuple[DataArguments, Any, Any]:
    """The options of `topd train`."""
    from trl import ModelConfig

    from topd.training.config import TOPDConfig

    parsed: tuple[DataArguments, Any, Any] = parse_options(argv, (DataArguments, TOPDConfig, ModelConfig), "topd train")
    return parsed
