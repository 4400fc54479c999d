"""`topd train --help` and `topd warmstart --help`: their most used options in groups; `--help-all` lists every option.

An option of a command's own classes is listed without being named here: add it to the class, with a help text whose
first clause says what it is.
"""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

SHORT = {
    "dtype": "Precision in which the weights are loaded: auto, float32, bfloat16, float16",
    "false_alarm_share": "Share of the candidates, those with the lowest D_OT, that opd-capped caps",
    "ground_cost": "Distance of two tokens: cosine or sqeuclidean",
    "guidance_reduction": "How the trajectory loss is averaged: mean, sum or per_token",
    "loss_top_k": "Most likely tokens per position requested from a server, without a teacher_model",
    "max_completion_length": "Maximum tokens of a response (also --max_new_tokens)",
    "max_steps": "Optimizer steps; -1: by num_train_epochs",
    "method": "opd: plain on-policy distillation; opd-capped: false alarms capped; topd: near-future guidance",
    "model_name_or_path": "The student (also --student): a folder, a Hub name, or an embedded model",
    "output_dir": "Folder of the run (also --out)",
    "prefix_weight_max": "Limit of a stored prefix's weight, with several updates per batch of rollouts",
    "recalibration_steps": "Re-estimate the threshold of low_loss_quartile every this many steps",
    "resume_from_checkpoint": "true: the newest complete checkpoint; auto: if there is one; or a folder",
    "student_window": "The student's window: rollout (its own next tokens), candidate or regenerated (both generated)",
    "teacher_model_name_or_path": "The teacher (also --teacher)",
    "teacher_server_kwargs": "Limits for requests to the server: timeout, patience, concurrency",
    "transport_solver": "exact (one-hot targets) or entropic (soft targets)",
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


@dataclass(frozen=True)
class Page:
    """What the help of a command lists.

    `groups`: title -> names of options, in order. Options of the command's own classes that no group names come last in
    the group of their class.
    """

    name: str  # of the command
    about: str  # what it does
    groups: Mapping[str, Sequence[str]]
    own: Mapping[Any, str]  # class of the command, in TRL's order -> title of its group
    hidden: Sequence[str] = ()  # own options that only `--help-all` lists

    @property
    def kinds(self) -> tuple[Any, ...]:
        from trl import ModelConfig

        return *self.own, ModelConfig


def show_help(argv: Sequence[str], page: Page) -> None:
    """Print the help and exit, if the words ask for it."""
    everything = "--help-all" in argv or "--help_all" in argv
    if everything or "--help" in argv or "-h" in argv:
        print(help_text(page, everything))
        raise SystemExit(0)


def help_text(page: Page, everything: bool) -> str:
    """`everything`: every option, with its whole text."""
    options = {option.name: (kind, option) for kind in page.kinds for option in fields(kind) if option.init}
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
    lines = [
        f"usage: topd {page.name} [FILE.yaml | recipe:NAME] [--option value ...]", "", page.about, "",
        *_entry("config", "YAML file with options, or recipe:NAME; recipe: alone lists the recipes. `topd "
                f"{page.name} FILE.yaml` is the same. The command line overrides the file"),
        *_entry("help-all", "List every option, also those of TRL and transformers"),
    ]  # fmt: skip
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            short = None if everything else SHORT.get(name, "")
            lines += _entry(name, _text(*options[name], short))
    lines += [
        "", "Processes:", *_entry("num_processes", "Start N processes (DDP)"),
        *_entry("accelerate_config", "Start processes as this file says, or a config of TRL: fsdp2, zero3, ... Other "
                "options of `accelerate launch` work too"),
    ]  # fmt: skip
    more = "" if everything else f" `topd {page.name} --help-all` lists {len(options)} options."
    return "\n".join([*lines, "", f"In parentheses: the default. Hyphens and underscores are the same.{more}"])


def own_options(kind: Any) -> set[str]:
    """Names of the options that a class, or a base of it, defines in this package."""
    return {name for each in kind.__mro__ if each.__module__.startswith("topd.") for name in each.__annotations__}


def _entry(name: str, text: str) -> list[str]:
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
