"""Option names from other tools and earlier versions: what they are called here, or what to write instead."""

import difflib
from collections.abc import Collection

from topd.errors import TOPDError
from topd.loading.options import spelling

SAME = {
    "cpu": "use_cpu",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lora": "use_peft",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "micro_batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "resume": "resume_from_checkpoint",
    "revision": "model_revision",
    "steps": "max_steps",
    "student_model": "model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "teacher_models": "teachers",
    "teacher_server_url": "teacher_model_server_url",
    "torch_dtype": "dtype",
    "train_data": "data",
    "train_dataset": "data",
    "train_file": "data",
    "use_lora": "use_peft",
    "warmup_ratio": "warmup_steps",
}
"""Names of the same meaning, under what they are here. (`warmup_steps` below 1 is a share of all steps.)"""

INSTEAD = {
    "alpha": "the weight of the trajectory loss is --guidance_weight; the LoRA scaling is --lora_alpha",
    "batch_size": "write --per_device_train_batch_size N; a step has N x processes x accumulation steps rows",
    "eval_dataset": "write --eval_data FILE",
    "gpus": "write --num_processes N; CUDA_VISIBLE_DEVICES chooses the GPUs",
    "lmbda": "all responses are the student's own, as with lmbda 1: leave it out",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "loss_type": "write --method opd, opd-capped or topd",
    "max_length": "write --max_completion_length N; prompts are not truncated",
    "max_prompt_length": "leave it out: prompts are not truncated; topd check names those that are too long",
    "nproc_per_node": "write --num_processes N, for all machines together",
    "num_gpus": "write --num_processes N; CUDA_VISIBLE_DEVICES chooses the GPUs",
    "num_generations": "one response is sampled per prompt and visit: raise --num_train_epochs",
    "overwrite_output_dir": "use another --output_dir, or delete the old one",
    "seq_kd": "use topd generate and topd warmstart, which train on the teacher's responses",
    "teacher_dtype": 'write --teacher_model_init_kwargs \'{"dtype": "bfloat16"}\'',
    "tokenizer": "both models use the student's tokenizer: leave it out",
    "tokenizer_name_or_path": "both models use the student's tokenizer: leave it out",
    "train_batch_size": "write --per_device_train_batch_size N; it is that of one process",
    "use_teacher_server": "--teacher_model_server_url alone is enough",
    "wandb": "write --report_to wandb",
}
"""Names without an equal here: what to do."""


def known_name(name: str, known: Collection[str], program: str) -> str:
    """The known spelling of an option that is typed as `--name`. `known`: names with underscores.

    Raises `TOPDError` if it is unknown; the message says what to write, or suggests close names.
    """
    found = spelling(name, known)
    plain = name.replace("-", "_")
    if found not in known:
        found = SAME.get(plain, found)
    if found in known:
        return found
    if plain in INSTEAD:
        raise TOPDError(f"Unknown option {name!r:.80}: {INSTEAD[plain]}.")
    close = difflib.get_close_matches(plain, sorted({*known, *SAME}), n=3)
    hint = f" Did you mean {' or '.join(f'--{SAME.get(each, each)}' for each in close)}?" if close else ""
    raise TOPDError(f"Unknown option {name!r:.80}.{hint} `{program} --help-all` lists all.")
