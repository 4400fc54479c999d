"""`topd train --help` and `topd warmstart --help`: their most used options in groups; `--help-all` lists every option.

An option of a command's own classes is listed without being named here: add it to the class, with a help text whose
first clause says what it is.
"""

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

SHORT = {
    "attn_implementation": "Attention: sdpa, flash_attention_2, ...",
    "bf16": "Compute in bfloat16",
    "chat_template_kwargs": 'Arguments of the chat template, such as {"enable_thinking": false}',
    "dtype": "Precision in which the weights are loaded: auto, float32, bfloat16, float16",
    "eval_steps": "Steps between evaluations",
    "eval_strategy": "When to evaluate: no, steps, epoch",
    "false_alarm_share": "Share of the candidates, those with the lowest D_OT, that opd-capped caps",
    "gradient_accumulation_steps": "Batches per optimizer step",
    "gradient_checkpointing": "Less memory for about 20 % more time",
    "ground_cost": "Distance of two tokens: cosine or sqeuclidean",
    "guidance_reduction": "How the trajectory loss is averaged: mean, sum or per_token",
    "learning_rate": "Learning rate",
    "load_in_4bit": "Student in 4 bits, with LoRA (bitsandbytes)",
    "logging_steps": "Steps between log lines",
    "lora_alpha": "Scaling of LoRA",
    "lora_r": "Rank of LoRA",
    "lora_target_modules": "Modules that get LoRA, such as all-linear",
    "loss_top_k": "Tokens per position whose probability a server is asked for, without a teacher here",
    "lr_scheduler_type": "Schedule of the learning rate: linear, cosine, constant, ...",
    "max_completion_length": "Maximum tokens of a response (also --max_new_tokens)",
    "max_grad_norm": "Gradients are clipped to this norm",
    "max_steps": "Optimizer steps; -1: by num_train_epochs",
    "method": "opd: plain on-policy distillation; opd-capped: false alarms capped; topd: near-future guidance",
    "model_name_or_path": "The student (also --student): a folder, a Hub name, or an embedded model",
    "num_train_epochs": "Passes over the data",
    "output_dir": "Folder of the run (also --out)",
    "packing": "Pack several solutions into a row",
    "per_device_train_batch_size": "Rows per process and batch",
    "prefix_weight_max": "Limit of a stored prefix's weight, with several updates per batch of rollouts",
    "push_to_hub": "Upload the trained model to the Hub",
    "recalibration_steps": "Steps after which the threshold of low_loss_quartile is estimated anew",
    "report_to": "Trackers: tensorboard, trackio, wandb, none",
    "resume_from_checkpoint": "true: the newest whole checkpoint; auto: if there is one; or a folder",
    "save_steps": "Steps between checkpoints",
    "save_strategy": "When to save checkpoints: no, steps, epoch",
    "save_total_limit": "Keep the newest N checkpoints",
    "seed": "Seed of data order and sampling",
    "student_window": "The student's window: rollout (its own next tokens), candidate or regenerated (both generated)",
    "teacher_model_init_kwargs": 'Arguments of from_pretrained for the teacher, such as {"dtype": "bfloat16"}',
    "teacher_model_name_or_path": "The teacher (also --teacher)",
    "teacher_server_kwargs": "Limits of the server's use: timeout, patience, concurrency",
    "temperature": "Sampling temperature",
    "top_p": "Nucleus sampling",
    "transport_solver": "exact (one-hot targets) or entropic (soft targets)",
    "trust_remote_code": "Run code that a model on the Hub brings",
    "use_cpu": "Train on the CPU",
    "use_peft": "Train a LoRA adapter instead of all weights",
    "use_vllm": "Sample with vLLM",
    "vllm_mode": "colocate: in this process; server: as started by trl vllm-serve",
    "warmup_steps": "Warm-up of the learning rate: steps, or a share below 1",
}
"""One line for options whose help, of TRL and transformers or ours, does not begin with one."""

RUN = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "bf16", "gradient_checkpointing", "use_cpu",
    "seed", "logging_steps", "report_to", "audit_steps", "eval_strategy", "eval_steps", "eval_benchmark",
    "eval_benchmark_limit", "eval_samples", "eval_temperature", "save_strategy", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip
"""The last group of both commands, as far as a command has these options."""

FIRST = {
    "config": "YAML file with options, or recipe:NAME; recipe: alone lists the recipes. `topd {name} FILE.yaml` is the "
    "same. The command line overrides the file",
    "help_all": "List every option, also those of TRL and transformers",
}
LAUNCH = {
    "num_processes": "Start N processes (DDP)",
    "accelerate_config": "Start processes as this file says, or a config of TRL: fsdp2, zero3, ... Other options of "
    "`accelerate launch` work too",
}


@dataclass(frozen=True)
class Page:
    """What the help of a command lists.

    Attributes:
        name: the command.
        about: what it does.
        groups: title -> names of options, in order. Options of the command's own classes that no group names come
            last in the group of their class.
        own: class of the command -> title of its group.
        hidden: own options that only `--help-all` lists.
        short: one line for options, in the place of `SHORT`.
    """

    name: str
    about: str
    groups: Mapping[str, Sequence[str]]
    own: Mapping[Any, str]
    hidden: Sequence[str] = ()
    short: Mapping[str, str] = field(default_factory=dict)


def show_help(argv: Sequence[str], page: Page, kinds: Iterable[Any]) -> None:
    """Print the help and exit, if the words ask for it."""
    if "--help-all" in argv or "--help_all" in argv:
        print(help_text(page, kinds, everything=True))
        raise SystemExit(0)
    if "--help" in argv or "-h" in argv:
        print(help_text(page, kinds))
        raise SystemExit(0)


def help_text(page: Page, kinds: Iterable[Any], everything: bool = False) -> str:
    """The help of a command; `everything`: of every option, with its whole text."""
    options = {option.name: (kind, option) for kind in kinds for option in fields(kind) if option.init}
    groups = {title: [name for name in names if name in options] for title, names in page.groups.items()}
    named = {name for names in groups.values() for name in names}
    for kind, title in page.own.items():
        groups[title] += [
            name for name, (_, option) in options.items()
            if name in own_options(kind) and name not in named and (everything or name not in page.hidden)
        ]  # fmt: skip
    if everything:
        listed = {name for names in groups.values() for name in names}
        groups["Others, of TRL and transformers"] = [name for name in options if name not in listed]
    first = {name: text.format(name=page.name) for name, text in FIRST.items()}
    lines = [f"usage: topd {page.name} [FILE.yaml | recipe:NAME] [--option value ...]", "", page.about, ""]
    lines += [line for name, text in first.items() for line in _entry(name.replace("_", "-"), text)]
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            short = None if everything else {**SHORT, **page.short}.get(name, "")
            lines += _entry(name, _text(*options[name], short))
    lines += ["", "Processes:", *(line for name, text in LAUNCH.items() for line in _entry(name, text))]
    more = "" if everything else f" `topd {page.name} --help-all` lists {len(options)} options."
    return "\n".join([*lines, "", f"In parentheses: the default. Hyphens and underscores are the same.{more}"])


def own_options(kind: Any) -> set[str]:
    """Names of the options that a class, or a base of it, defines in this package."""
    return {name for each in kind.__mro__ if each.__module__.startswith("topd.") for name in each.__annotations__}


def _entry(name: str, text: str) -> list[str]:
    """An option's lines."""
    width = min(shutil.get_terminal_size().columns, 120)
    start = f"  --{name}"
    start = f"{start:34}" if len(start) < 33 else f"{start}  "
    return textwrap.wrap(
        f"{start}{text}", width, subsequent_indent=" " * 34, break_long_words=False, break_on_hyphens=False
    )


def _text(kind: Any, option: Field[Any], short: str | None) -> str:
    """What an option is, and its default. `short`: one line; "": the first clause of its help; None: all of it."""
    told = str(option.metadata.get("help", "")).replace("%%", "%")
    hint = get_type_hints(kind)[option.name]
    if short is not None:
        told = short or re.split(r"[:;.](?= |$)", told, maxsplit=1)[0]
    choices = [str(value) for value in get_args(hint)] if get_origin(hint) is Literal else []
    if choices and not all(re.search(rf"\b{re.escape(value)}\b", told) for value in choices):
        told = f"{told.rstrip('.')}: {', '.join(choices)}"
    default = option.default if option.default_factory is MISSING else option.default_factory()
    plain = str(default).lower() if isinstance(default, bool) else str(getattr(default, "value", default))
    shown = "" if default is None or default is MISSING or default == [] else f" ({plain})"
    return f"{' '.join(told.split())}{shown}"
