"""`topd train`: models, data and options from a YAML file and the command line, then `TOPDTrainer`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.cli.data_options import FormArguments, form_of, option
from topd.cli.help import RUN, Page
from topd.cli.options import data_source, parse_options, prompts, resume_from, run_training, start_record, trained
from topd.embedded.task import DATA
from topd.errors import TOPDError
from topd.visible import visible

if TYPE_CHECKING:
    from topd.check.setup import ModelInfo, Setup


@dataclass
class DataArguments(FormArguments):
    """Where prompts come from."""

    data: dict[str, float] | str | list[str] | None = option(
        None,
        "Training prompts from JSONL, JSON, CSV or Parquet files (names or patterns such as 'part-*.jsonl'), a folder, "
        "or a Hub dataset: text or messages, optionally with a column `answer`. Also several of them; or a mixture, "
        "{source: weight}; or `embedded` or `embedded-long`, the embedded task. Default for embedded models: their "
        "task; required for others.",
    )
    data_split: str = option("train", "Split of a Hub dataset or a folder.")
    data_limit: int | None = option(None, "Use only the first N prompts.")
    data_streaming: bool = option(
        False, "Stream the rows during training, instead of reading all of them first. Needs max_steps."
    )
    eval_data: dict[str, float] | str | list[str] | None = option(
        None, "Prompts for the evaluation loss, in the same forms as `data`."
    )
    preflight: bool = option(
        True, "Check models, data and machine before training (as topd check --quick), and stop on errors."
    )


def page() -> Page:
    from topd.training.config import TOPDConfig
    from topd.training.option_checks import CONTROLS

    groups = {
        "Method": ("method",),
        "Data": (
            "data", "data_split", "data_limit", "chat_template_kwargs", "max_completion_length", "temperature", "top_p",
        ),
        "Models": (
            "model_name_or_path", "teacher_model_name_or_path", "teachers", "teacher_model_init_kwargs", "dtype",
            "attn_implementation", "trust_remote_code", "use_peft", "lora_r", "lora_alpha", "lora_target_modules",
            "load_in_4bit", "use_vllm", "vllm_mode", "teacher_model_server_url", "teacher_server_model",
            "teacher_server_key_env", "teacher_server_kwargs", "loss_top_k",
        ),
        "Run": RUN,
    }  # fmt: skip
    about = "Distil a student from a teacher, by on-policy distillation (OPD) or with near-future guidance (TOPD)."
    own = {DataArguments: "Data", TOPDConfig: "Method"}
    return Page("train", about, groups, own, hidden=tuple(CONTROLS))


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, train, save; the exit status. Raises `TOPDError` for every user-fixable error."""
    return run_training(argv, page, _train)


def _train(words: Sequence[str], data: DataArguments, config: Any, model: Any) -> None:
    from topd.loading.data import source_name
    from topd.runs.checkpoints import saving
    from topd.runs.summary import print_summary, where_to_look
    from topd.training.several_teachers import MOPDTrainer
    from topd.training.trainer import TOPDTrainer

    student, teachers = named(config, model)
    one = next(iter(teachers.values()), None)
    kind, teacher = (MOPDTrainer, teachers) if config.teachers else (TOPDTrainer, one)
    data.data = data_source(data.data, student, *teachers.values())
    record = start_record(words, data, config, model)
    check_streaming(data, config)
    train_dataset = load(data, config)
    eval_dataset = evaluation_prompts(data) if data.eval_data else None
    resume = resume_from(config)
    if data.preflight:
        before_training(data, config, model, train_dataset, eval_dataset)
    names = " and ".join([student, *teachers.values()])
    trainer, first = trained(kind, names, config, model, record, resume, teacher, train_dataset, eval_dataset)
    with saving(f"The trained model in {config.output_dir}", Path(config.output_dir)):
        trainer.save_model(config.output_dir)
        trainer.save_state()  # for topd report
        trainer.create_model_card(model_name=Path(config.output_dir).name)
    if trainer.is_world_process_zero():
        at_end = where_to_look(Path(config.output_dir))
        print_summary(trainer.state.log_history, at_end, trainer.state.global_step, first)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=source_name(data.data))
    trainer.end()


def named(config: Any, model: Any) -> tuple[str, dict[str, str]]:
    """The student, and the teachers by their names in the data ("" for a single one); none if it is on a server."""
    one = {"": config.teacher_model_name_or_path} if config.teacher_model_name_or_path else {}
    teachers: dict[str, str] = dict(config.teachers or {}) or one
    if not model.model_name_or_path or not (teachers or config.teacher_model_server_url):
        raise TOPDError(
            "Specify the student and the teacher: --student and --teacher (a folder, a Hub name, or "
            "embedded:long-student and embedded:long-teacher), or --config recipe:embedded. If the teacher is on a "
            "server only: --teacher_model_server_url."
        )
    from topd.loading.adapters import weights_of

    for name in (model.model_name_or_path, *teachers.values()):
        weights_of(name)  # reports an adapter that cannot be loaded before anything else is
    return model.model_name_or_path, teachers


def parse(argv: Sequence[str]) -> tuple[DataArguments, Any, Any]:
    return parse_options(argv, page())


# The data


def check_streaming(data: DataArguments, config: Any) -> None:
    """Raise `TOPDError` for what does not work with a stream."""
    if not data.data_streaming:
        return
    if config.max_steps < 1:
        raise TOPDError("data_streaming needs max_steps: the number of rows of a stream is not known.")
    if isinstance(data.data, str) and data.data in DATA:
        raise TOPDError("The embedded task is drawn at once: leave data_streaming out.")


def load(data: DataArguments, config: Any) -> Any:
    """The training prompts: a dataset, or a stream; with each row's teacher where there are several."""
    from topd.loading.rows import TEACHER_PROMPT, read_teacher_prompt, read_text
    from topd.training.several_teachers import COLUMN

    also: Any = {TEACHER_PROMPT: read_teacher_prompt} | ({COLUMN: read_text} if config.teachers else {})
    if not data.data_streaming:
        return prompts(data.data, data.data_split, data.data_limit, also=also, form=form_of(data))
    from topd.loading.data import stream_prompts

    source: Any = data.data
    return stream_prompts(source, split=data.data_split, limit=data.data_limit, also=also, form=form_of(data))


def evaluation_prompts(data: DataArguments) -> Any:
    from topd.loading.rows import TEACHER_PROMPT, read_teacher_prompt

    also = {TEACHER_PROMPT: read_teacher_prompt}
    return prompts(data.eval_data, data.data_split, data.data_limit, also=also, form=form_of(data))


# The checks before it


def setups_of(
    data: Any, config: Any, model: Any, dataset: Any = None, evaluation: Any = None, teacher_here: bool = True
) -> dict[str, Setup]:
    """What is known about a run without weights: by the teacher's name in the data, "" for a single teacher.

    `dataset`, `evaluation`: the prompts, and those of the evaluation loss, if they are loaded already. Raises
    `TOPDError` if something cannot be read.
    """
    from datasets import Dataset
    from trl import get_peft_config, get_quantization_config

    from topd.check.setup import Setup, describe
    from topd.loading.adapters import is_adapter
    from topd.loading.data import source_name
    from topd.loading.dataset_checks import step_size
    from topd.loading.rows import TEACHER_PROMPT
    from topd.loading.shared_base import share_base
    from topd.loading.teacher_prompts import SELF

    name, teachers = named(config, model)
    trust = config.trust_remote_code
    dtypes = {
        "student": (config.model_init_kwargs or {}).get("dtype", model.dtype),
        "teacher": (config.teacher_model_init_kwargs or {}).get("dtype", model.dtype),
    }
    for dtype in dtypes.values():
        if dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise TOPDError(f"dtype is {dtype!r}; write auto, float32, bfloat16 or float16.")
    data.data = data_source(data.data, name, *teachers.values())
    check_streaming(data, config)
    dataset = dataset if dataset is not None else load(data, config)
    if evaluation is None and data.eval_data:
        evaluation = evaluation_prompts(data)
    if data.data_streaming:  # enough rows for the checks
        dataset = Dataset.from_list(list(dataset.take(max(1024, step_size(config)[0]))))
    student = describe("student", name, trust, model.model_revision)

    def described(teacher: str) -> ModelInfo:
        if teacher == SELF:
            return replace(student, role="teacher")
        return describe("teacher", teacher, trust, config.teacher_model_revision)

    def column(name: str) -> Any:
        return dataset[name][:] if name in dataset.column_names else None

    def one_base(teacher: str) -> bool:
        names = name, name if teacher == SELF else teacher
        return share_base(*names, config, get_peft_config(model), get_quantization_config(model))

    return {
        key: Setup(
            student, described(teacher), config, column("prompt"), column("answer") or [None] * len(dataset),
            source_name(data.data), {role: dtype or "auto" for role, dtype in dtypes.items()},
            adapters=model.use_peft or is_adapter(name), one_base=one_base(teacher), teacher_here=teacher_here,
            model=model, evaluation=None if evaluation is None else len(evaluation),
            teacher_prompts=column(TEACHER_PROMPT),
        )
        for key, teacher in teachers.items()
    }  # fmt: skip


def before_training(data: Any, config: Any, model: Any, dataset: Any, evaluation: Any = None) -> None:
    """The quick checks with which `topd train` begins: warnings are printed, errors raise `TOPDError`."""
    from topd.check.checks import quick_findings
    from topd.check.findings import errors_message, worst

    setups = setups_of(data, config, model, dataset, evaluation)
    findings = dict.fromkeys(finding for setup in setups.values() for finding in quick_findings(setup))
    if worst(list(findings)) == "error":
        raise TOPDError(f"{errors_message(list(findings))}\n--preflight false trains anyway.")
    if config.should_log:
        for finding in findings:
            if finding.verdict == "warning" and finding.check != "precision":  # the trainer logs it
                print(visible(f"topd: {finding.check}: {finding.found}. {finding.remedy}"), file=sys.stderr)
