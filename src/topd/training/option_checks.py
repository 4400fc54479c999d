"""What the options of `TOPDConfig` may be: ranges, and which exclude each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING

from topd.loading.options import check_objects

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

CONTROLS = {
    "guidance_target": "topd", "guidance_at": "topd", "guidance_context": "topd", "cap_false_alarms": "topd",
    "cap_selection": "opd-capped", "token_share": "opd",
}  # fmt: skip
"""Options that study what the parts of a method do, which no run needs, and that method."""

RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("window_length", "recalibration_steps", "loss_top_k", "num_iterations", "steps_per_generation",
      "max_completion_length_steps", "max_informative_tokens", "eval_samples", "eval_benchmark_limit"),
     lambda value: value < 1, "be at least 1"),
    (("audit_steps", "guidance_weight", "eval_temperature"), lambda value: value < 0, "not be negative"),
    (("window_memory", "max_overhead", "entropic_epsilon", "temperature"),
     lambda value: not 0 < value < math.inf, "be positive"),
)  # fmt: skip
"""Options, when a value of theirs is wrong, and the rule for the message. None is allowed where an option has it."""


def check_options(args: TOPDConfig, own: Container[str], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a value that is out of range or not among those allowed, and options that exclude each other.

    `own`: names of the options that are not TRL's. `choices`: the allowed values of options that have a fixed set.

    Raises:
        ValueError: names the option, what it may be, and what it is.
    """
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(args, name)!r}.")
    if args.fork_threshold is None and args.fork_rule == "threshold":
        raise ValueError("fork_rule=threshold needs fork_threshold, a D_OT such as topd probe reports.")
    for name, value in vars(args).items():
        if name in own and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite; got {value}.")
    check_objects(args)
    for name in ("candidate_share", "token_share"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"{name} must be in (0, 1]; got {getattr(args, name)}.")
    for names, is_wrong, rule in RANGES:
        for name in names:
            given = getattr(args, name)
            if given is not None and is_wrong(given):
                raise ValueError(f"{name} must {rule}; got {given}.")
    if not 0 <= args.false_alarm_share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1); got {args.false_alarm_share}.")
    if args.torch_compile:
        raise ValueError(
            "torch_compile does nothing for distillation, which calls parts of the models directly: leave it out, with "
            "torch_compile_backend and torch_compile_mode."
        )
    _check_controls(args)
    _check_evaluation(args)
    _check_rollouts(args)
    if (args.looks_ahead or args.opd_loss == "one_pass") and args.beta not in (0.0, 1.0):
        raise ValueError(
            f"method={args.method} with opd_loss={args.opd_loss} needs beta 1 (reverse KL, the paper) or 0 "
            f"(forward KL); got beta={args.beta}."
        )


def _check_controls(args: TOPDConfig) -> None:
    """A control of a study, where the method does not have what it controls, and controls that exclude each other."""
    for name, method in CONTROLS.items():
        if args.method != method and getattr(args, name) != getattr(type(args), name):
            raise ValueError(f"{name} is a control of method={method}; leave it out with method={args.method}.")
    if args.guidance_context == "teacher" and args.guidance_target != "transport":
        raise ValueError(
            f"guidance_target={args.guidance_target} does nothing with guidance_context=teacher, whose loss is a KL to "
            "the teacher's distribution: leave one of them out."
        )
    if args.token_share < 1 and args.prefix_weight_max is not None:
        raise ValueError("prefix_weight_max is a mean over all tokens of a prefix: leave it or token_share out.")


def _check_evaluation(args: TOPDConfig) -> None:
    """An evaluation on problems that would not run, or that says nothing."""
    if args.eval_temperature == 0 and args.eval_samples > 1:
        raise ValueError(
            "At eval_temperature 0 all samples of a problem are the same: leave eval_samples out, or set a temperature."
        )
    if args.eval_benchmark is not None and args.eval_strategy == "no":
        raise ValueError(
            "eval_benchmark is given, but eval_strategy is no: nothing would be evaluated. Set eval_strategy to steps "
            "(with eval_steps) or epoch."
        )


def _check_rollouts(args: TOPDConfig) -> None:
    """Options of rollouts."""
    accumulated = args.gradient_accumulation_steps
    if args.generation_steps % accumulated:
        raise ValueError(
            f"steps_per_generation must be a multiple of gradient_accumulation_steps ({accumulated}); got "
            f"{args.steps_per_generation}."
        )
    most = args.prefix_weight_max
    if most is not None and most < 1:
        raise ValueError(f"prefix_weight_max must be at least 1; got {most}.")
    if most is not None and args.updates_per_generation == 1:
        raise ValueError(
            "prefix_weight_max does nothing with one update per batch of rollouts, whose prefixes are never stale; set "
            "num_iterations or steps_per_generation, or leave it out."
        )
    if most is not None and not (args.looks_ahead or args.opd_in_one_pass):
        raise ValueError("prefix_weight_max needs TOPD's own loss: opd_loss=one_pass or auto, and beta 0 or 1.")
    start, longest = args.max_completion_length_start, args.max_completion_length
    if (start is None) != (args.max_completion_length_steps is None):
        raise ValueError("max_completion_length_start and max_completion_length_steps go together: give both.")
    if start is not None and (longest is None or not 1 <= start <= longest):
        raise ValueError(
            f"max_completion_length_start must be from 1 to max_completion_length ({longest}); got {start}."
        )
