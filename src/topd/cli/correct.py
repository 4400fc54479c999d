"""`topd correct`: from names to forks and their correction. The analysis is in `analysis/`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from topd.cli.options import check_at_least_one
from topd.cli.probe import add_pair_options, check_length, checked, token_ids, weights_of
from topd.errors import TOPDError

if TYPE_CHECKING:
    from topd.near_future import Rollouts


def add_options(parser: argparse.ArgumentParser) -> None:
    add_pair_options(parser, out="runs/correct")
    parser.add_argument("--steps", type=int, default=5, help="gradient steps per window (default: 5, the paper's M)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="for AdamW (default: %(default)s)")
    parser.add_argument("--guidance-weight", type=float, help="lambda (default: that of topd train)")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM",
        help="any of: opd, topd, opd on teacher, topd on teacher (on the teacher's continuation), own tokens, "
        "same index, teacher's contexts (default: all)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from topd.analysis.correct import ARMS, CorrectOptions, Corrector, find_forks
    from topd.analysis.correct_command import CorrectRun, run_correct
    from topd.loading.pair import load_pair
    from topd.near_future.model_parts import end_token_ids
    from topd.near_future.sampling import local_pair, sample_rollouts
    from topd.runs.console import progress, silence_libraries

    silence_libraries()
    names = checked(options)
    check_at_least_one(options, "steps")
    if not 0 < options.learning_rate < math.inf or not 0 <= (options.guidance_weight or 0.0) < math.inf:
        raise TOPDError("--learning-rate must be positive, --guidance-weight must not be negative.")
    arms = tuple(options.arms or ARMS)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise TOPDError(f"There is no arm {unknown[0]!r}; available: {', '.join(ARMS)}.")
    student, teacher, tokenizer = load_pair(names["student"], names["teacher"], options.dtype)
    settings = CorrectOptions(
        options.window_length[0], options.share, options.steps, options.learning_rate, arms=arms, seed=options.seed
    )
    if options.guidance_weight is not None:
        settings = replace(settings, guidance_weight=options.guidance_weight)
    rows = token_ids(options, tokenizer, end_token_ids(student.generation_config, tokenizer))
    check_length(rows, tokenizer, options, student, teacher)
    pair = local_pair(student, teacher, tokenizer, micro_batch=options.batch)

    def batches(advance: Callable[[int], None]) -> Iterator[Rollouts]:
        for first in range(0, len(rows), options.batch):
            torch.manual_seed(options.seed * 1_000_003 + first)
            prompts = [torch.tensor(row["prompt_ids"]) for row in rows[first : first + options.batch]]
            yield sample_rollouts(
                student, tokenizer, prompts, max_new_tokens=options.max_new_tokens, temperature=options.temperature
            )
            advance(len(prompts))

    with progress(Console(), "finding forks", len(rows)) as advance:
        forks = find_forks(*pair, batches(advance), settings)
    if not forks:
        raise TOPDError(
            f"None of the {len(rows)} rollouts has a fork: no high-loss token's D_OT is above the upper quartile of "
            "the low-loss tokens. Look at more positions with --rollouts or --share, or see topd probe."
        )
    corrector = Corrector(
        student, pair, tokenizer, settings, is_right_on(options.data, rows), [len(row["prompt_ids"]) for row in rows],
        options.max_new_tokens,
    )  # fmt: skip
    correct_run = CorrectRun(
        names["student"], names["teacher"], options.data, options.rollouts, options.max_new_tokens, settings,
        options.chat_template_kwargs, weights_of(names, student, teacher),
    )  # fmt: skip
    run_correct(correct_run, corrector, forks, tokenizer.decode, options.out)


def is_right_on(data: str, rows: list[dict[str, Any]]) -> Callable[[int, str], bool] | None:
    """A function that says whether a text ends with its prompt's answer; None for other data than ours."""
    from topd.embedded.task import DATA, is_correct
    from topd.evaluation.answers import verdict
    from topd.lm.pair import DATA as LM_DATA

    if data in LM_DATA:
        return lambda rollout, text: verdict(text, rows[rollout]["answer"], "gsm8k").right
    if data not in DATA:
        return None

    return lambda rollout, text: is_correct(text, rows[rollout]["answer"])
