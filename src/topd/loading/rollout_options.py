"""Options on how rollouts are used and how long they are: what they may be, and what follows from them."""

from __future__ import annotations

from typing import Any


def check_rollouts(args: Any) -> None:
    """Raise `ValueError` for options of rollouts (of `TOPDConfig`) that exclude each other or do nothing."""
    accumulated = args.gradient_accumulation_steps
    if args.generation_steps < 1 or args.generation_steps % accumulated:
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


def completion_limit(args: Any, step: int) -> int | None:
    """Maximum tokens of a rollout that is sampled after `step` optimizer steps; None: no limit."""
    start, steps, longest = (
        args.max_completion_length_start,
        args.max_completion_length_steps,
        args.max_completion_length,
    )
    if start is None or step >= steps:
        return longest  # type: ignore[no-any-return]
    return int(start + (longest - start) * step // steps)
