"""`topd warmstart`: models, solutions and options from a YAML file and the command line, then `WarmStartTrainer`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd.cli.data_options import FormArguments, form_of, option
from topd.cli.help import RUN, Page
from topd.cli.options import parse_options, resume_from, run_training, start_record, trained
from topd.errors import TOPDError


@dataclass
class SolutionArguments(FormArguments):
    """Where solutions come from."""

    data: dict[str, float] | str | list[str] | None = option(
        None,
        "Solutions that `topd generate` wrote, or any JSONL, JSON, CSV or Parquet file, folder or Hub "
        "dataset with the columns `prompt` (text or messages) and `completion` (text), or with conversations that "
        "end with the answer; several, or a mixture, {source: weight}.",
    )
    data_split: str = option("train", "Split of a Hub dataset.")
    data_limit: int | None = option(None, "Use only the first N solutions.")
    eval_data: dict[str, float] | str | list[str] | None = option(None, "Solutions for the evaluation loss.")
    keep_truncated: bool = option(
        False,
        "Also train on responses that the length limit truncated. They teach the student to stop there; "
        "our choice: no.",
    )


def page() -> Page:
    from topd.warmstart.config import WarmStartConfig

    groups = {
        "Method": ("kd_ratio", "packing"),
        "Data": ("data", "data_split", "data_limit", "chat_template_kwargs", "max_length"),
        "Models": (
            "model_name_or_path", "teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs",
            "dtype", "attn_implementation", "trust_remote_code", "use_peft", "lora_r", "lora_alpha",
            "lora_target_modules", "load_in_4bit",
        ),
        "Run": RUN,
    }  # fmt: skip
    about = "Stage 1: train the student on a teacher's solutions, with forward KL and cross-entropy."
    own = {SolutionArguments: "Data", WarmStartConfig: "Method"}
    return Page("warmstart", about, groups, own, hidden=("prediction_loss_only",))


def main(argv: Sequence[str]) -> int:
    """Parse, load, train, save; the exit status. Raises `TOPDError` for every user-fixable error."""
    return run_training(argv, page, _train)


def _train(words: Sequence[str], data: SolutionArguments, config: Any, model: Any) -> None:
    from topd.loading.adapters import weights_of
    from topd.runs.checkpoints import saving
    from topd.runs.summary import print_summary, where_weights_are
    from topd.warmstart.trainer import WarmStartTrainer

    record = start_record(words, data, config, model)
    if not model.model_name_or_path or not data.data or not (config.teacher_model_name_or_path or not config.distils):
        raise TOPDError(
            "Specify the student, the teacher and the solutions: --student, --teacher (not needed with --kd_ratio 0), "
            "--data; or --config recipe:embedded-warmstart. `topd generate` writes solutions."
        )
    weights_of(model.model_name_or_path)  # reports an adapter that cannot be loaded before anything else is
    if config.distils:
        weights_of(config.teacher_model_name_or_path)
    resume = resume_from(config)
    teacher = config.teacher_model_name_or_path if config.distils else None
    datasets = {"train": data.data, "eval": data.eval_data}
    loaded = {part: solutions(source, data) for part, source in datasets.items() if source}
    names, folder = " and ".join(filter(None, (model.model_name_or_path, teacher))), Path(config.output_dir)
    trainer, first = trained(
        WarmStartTrainer, names, config, model, record, resume, teacher, loaded["train"], loaded.get("eval")
    )
    with saving(f"The trained model in {folder}", folder):
        saved = save(trainer, folder)
    if trainer.is_world_process_zero():
        checkpoints = where_weights_are(folder)[1:]
        at_end = [f"Model: {saved}", *checkpoints, f"Next: topd train --student {shlex.quote(str(saved))}"]
        print_summary(trainer.state.log_history, at_end, trainer.state.global_step, first)


def parse(argv: Sequence[str]) -> tuple[SolutionArguments, Any, Any]:
    return parse_options(argv, page())


def solutions(source: Any, data: SolutionArguments) -> Any:
    """The rows in the form that TRL's trainer takes."""
    from topd.warmstart.solutions import load_solutions

    return load_solutions(
        source, split=data.data_split, limit=data.data_limit, truncated=data.keep_truncated, form=form_of(data)
    )


def save(trainer: Any, folder: Path) -> Path:
    """Save a model that `topd train` takes, and return its folder: whole weights.

    A LoRA adapter is merged, and also saved in `adapter/`. Sharded weights are not merged, which would need all
    processes and a whole model in one of them: then the folder is that of the adapter, which `topd train` takes too.
    """
    from accelerate.utils import is_peft_model

    from topd.loading.adapters import merged_adapter
    from topd.loading.sharding import sharded

    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        trainer.save_model(str(folder / "adapter"))
        if sharded(trainer.args):
            return folder / "adapter"
        if trainer.accelerator.is_main_process:
            merged_adapter(model).save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    return folder
