"""`topd probe` and `topd correct`: from names to loaded models and token ids. The analyses are in `analysis/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.cli.arguments import data_source, json_object, prompts
from topd.errors import TOPDError

if TYPE_CHECKING:
    from topd.near_future import Rollouts

EMBEDDED = {"student": "embedded:long-student", "teacher": "embedded:long-teacher"}
EMBEDDED_DEFAULTS = {
    "embedded-long": {"window_length": [32], "share": 0.0225, "max_new_tokens": 224},
    "embedded": {"window_length": [16], "share": 0.06, "max_new_tokens": 64},
}
"""Of the embedded task, whose responses have about 145 or 60 tokens; other pairs have the paper's K and share."""
STUDENT_WINDOWS = ("rollout", "candidate", "regenerated")
DEFAULTS = {"window_length": [50], "share": 0.0225, "max_new_tokens": 2048}


def add_probe(commands: Any) -> None:
    """The command's options."""
    probe = commands.add_parser("probe", help="which high-loss tokens of a pair are false alarms? No training")
    _pair_options(probe, out="runs/probe")
    probe.add_argument(
        "--embedding", nargs="+", default=["student"], help="the main one first (default: %(default)s)",
        choices=("student", "teacher", "student_hidden", "teacher_hidden"),
    )  # fmt: skip
    probe.add_argument(
        "--given-responses", action="store_true",
        help="measure the column `response` (or `completion`) of --data, and sample nothing",
    )  # fmt: skip
    probe.add_argument(
        "--student-window", nargs="+", default=["rollout"], choices=(*STUDENT_WINDOWS, "all"),
        help="readings of the student's window, the main one first: the rollout's own next K tokens; the candidate "
        "token, then the student's greedy continuation; its greedy continuation of the prefix (default: rollout)",
    )  # fmt: skip
    probe.add_argument(
        "--candidate-ranking", default="reverse_kl", choices=("reverse_kl", "teacher_nll", "log_ratio"),
        help="what makes a position high-loss: the token loss, the teacher's NLL of the sampled token, or log p_S - "
        "log p_T of it (default: %(default)s)",
    )  # fmt: skip
    probe.add_argument("--cost", nargs="+", default=["cosine"], choices=("cosine", "sqeuclidean"))
    probe.set_defaults(run=run_probe_command, alone=True)


def run_probe_command(options: argparse.Namespace) -> None:
    """Check, load, probe."""
    from topd.analysis.probe import ProbeOptions
    from topd.analysis.probe_command import ProbeRun, run_probe
    from topd.near_future.generation import end_token_ids

    names = _checked(options)
    student, teacher, tokenizer = load_pair(names["student"], names["teacher"], options.dtype)
    rows = token_ids(options, tokenizer, end_token_ids(student.generation_config, tokenizer), options.given_responses)
    if options.given_responses:
        options.rollouts = len(rows)
        for row in rows:
            row["response_ids"] = row["response_ids"][: options.max_new_tokens]
    _check_length(rows, tokenizer, options, student, teacher)
    run = ProbeRun(
        names["student"], names["teacher"], options.data, options.rollouts, options.batch, options.max_new_tokens,
        options.temperature, options.given_responses,
        ProbeOptions(options.share, tuple(options.window_length), tuple(options.embedding), tuple(options.cost),
                     options.seed, options.candidate_ranking, _windows(options.student_window)),
        options.chat_template_kwargs,
    )  # fmt: skip
    run_probe(run, student, teacher, tokenizer, rows, options.out)


def _windows(chosen: list[str]) -> tuple[Any, ...]:
    """The readings that are wanted, each once; "all" stands for those not named."""
    every = [kind for name in chosen for kind in (STUDENT_WINDOWS if name == "all" else (name,))]
    return tuple(dict.fromkeys(every))


def _pair_options(parser: argparse.ArgumentParser, out: str) -> None:
    """What both analyses take: a pair, prompts, rollouts, windows."""
    parser.add_argument(
        "--config", action=FromRecipe, metavar="FILE",
        help="YAML file of topd train: its pair, data, chat template options, windows; options after it win",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, default={}, metavar="JSON",
        help="for prompts that are messages, such as '{\"enable_thinking\": false}'; as in the run that is to come",
    )  # fmt: skip
    parser.add_argument(
        "--student", help=f"folder (of a LoRA adapter too), Hub name, or embedded one (default: {EMBEDDED['student']})"
    )
    parser.add_argument("--teacher", help=f"the same (default: {EMBEDDED['teacher']})")
    parser.add_argument(
        "--data", help="prompts: file, folder or Hub dataset, as for topd train (default: the embedded task, for "
        "embedded models)",
    )  # fmt: skip
    parser.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=128, help="how many (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rollouts measured together (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="of a rollout (default: 2048; embedded-long: 224)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollouts (default: %(default)s)")
    parser.add_argument(
        "--window-length", type=int, nargs="+", help="K, the main one first (default: 50; embedded-long: 32)"
    )
    parser.add_argument("--share", type=float, help="of positions that are looked at (default: 0.0225)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the models: auto, float32, bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(out),
        help="folder; run again to go on after an interruption (default: %(default)s)",
    )  # fmt: skip


def _checked(options: argparse.Namespace) -> dict[str, str]:
    """Fill in what depends on the data, refuse what cannot be; the models' names by role."""
    if (options.student is None) != (options.teacher is None):
        raise TOPDError("Name both --student and --teacher, or neither (the embedded pair).")
    names = {role: getattr(options, role) or EMBEDDED[role] for role in EMBEDDED}
    options.data = data_source(options.data, *names.values())
    for name, value in EMBEDDED_DEFAULTS.get(options.data, DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("rollouts", "batch", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise TOPDError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}.")
    if not 0 < options.share <= 1 or min(options.window_length) < 1 or options.temperature <= 0:
        raise TOPDError("--share must be in (0, 1], --window-length at least 1, --temperature positive.")
    return names


def _check_length(rows: list[dict[str, Any]], tokenizer: Any, options: Any, student: Any, teacher: Any) -> None:
    from topd.loading.tokenizers import check_context

    most = max(rows, key=lambda row: len(row["prompt_ids"]))["prompt_ids"]
    check_context(
        len(most), tokenizer.decode(most), options.max_new_tokens, max(options.window_length),
        {"student": student.config, "teacher": teacher.config},
    )  # fmt: skip


def load_pair(student_name: str, teacher_name: str, dtype: str = "auto") -> tuple[Any, Any, Any]:
    """Both models in evaluation mode on the best device, and their common tokenizer.

    Raises:
        TOPDError: one cannot be loaded, or the tokenizers differ.
    """
    from topd.loading.models import loaded_model
    from topd.loading.pair import cut_head, head_rows, heads_in_words
    from topd.loading.tokenizers import check_rows, check_tokenizers
    from topd.runs.quiet import quieten

    quieten()
    pairs = [loaded_model(name, dtype) for name in (student_name, teacher_name)]
    models, tokenizers = [list(each) for each in zip(*pairs, strict=True)]
    check_tokenizers(*tokenizers)
    if tokenizers[0].pad_token is None:
        tokenizers[0].pad_token = tokenizers[0].eos_token
    rows = [head_rows(model) for model in models]
    note = check_rows(tokenizers[0], *rows)
    if note:
        print(f"topd: {note}", file=sys.stderr)
    if rows[0] != rows[1]:
        print(f"topd: {heads_in_words(*rows)}", file=sys.stderr)
        cut_head(models[rows.index(max(rows))], min(rows))
    return models[0], models[1], tokenizers[0]


def token_ids(
    options: argparse.Namespace, tokenizer: Any, ends: list[int], responses: bool = False
) -> list[dict[str, Any]]:
    """Prompts as token ids; messages go through the chat template. Given responses get their end token."""
    from topd.loading.prompts import closing_id, prompt_ids, solution_ids

    rows, template = [], options.chat_template_kwargs
    for row in prompts(options.data, options.split, options.rollouts, responses):
        rows.append({"prompt_ids": prompt_ids(tokenizer, row["prompt"], template), "answer": row.get("answer")})
        if responses:
            closing = closing_id(tokenizer, ends, template, not isinstance(row["prompt"], str))
            rows[-1]["response_ids"] = solution_ids(tokenizer, row["prompt"], row["response"], template, closing)[1]
    return rows


def add_correct(commands: Any) -> None:
    """The command's options."""
    correct = commands.add_parser(
        "correct", help="does guidance at one fork bring the student back? A few steps on single windows"
    )
    _pair_options(correct, out="runs/correct")
    correct.add_argument("--steps", type=int, default=5, help="gradient steps on a window (default: 5, the paper's M)")
    correct.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW (default: %(default)s)")
    correct.add_argument("--guidance-weight", type=float, help="lambda (default: that of topd train)")
    correct.add_argument(
        "--arms", nargs="+", metavar="ARM",
        help="which of: opd, topd, opd on teacher, topd on teacher (on the teacher's continuation), own tokens, "
        "same index, teacher's contexts (default: all)",
    )  # fmt: skip
    correct.set_defaults(run=run_correct_command, alone=True)


def run_correct_command(options: argparse.Namespace) -> None:
    """Check, load, find forks, correct them."""
    import torch

    from topd.analysis.correct import ARMS, CorrectOptions, Corrector, find_forks
    from topd.analysis.correct_command import CorrectRun, run_correct
    from topd.near_future.generation import end_token_ids
    from topd.near_future.sampling import local_pair, sample_rollouts

    names = _checked(options)
    arms = tuple(options.arms or ARMS)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise TOPDError(f"There is no arm {unknown[0]!r}; there are: {', '.join(ARMS)}.")
    student, teacher, tokenizer = load_pair(names["student"], names["teacher"], options.dtype)
    settings = CorrectOptions(
        options.window_length[0], options.share, options.steps, options.learning_rate, arms=arms, seed=options.seed
    )
    if options.guidance_weight is not None:
        settings = replace(settings, guidance_weight=options.guidance_weight)
    rows = token_ids(options, tokenizer, end_token_ids(student.generation_config, tokenizer))
    _check_length(rows, tokenizer, options, student, teacher)
    pair = local_pair(student, teacher, tokenizer, micro_batch=options.batch)

    def batches() -> Iterator[Rollouts]:
        for first in range(0, len(rows), options.batch):
            torch.manual_seed(options.seed * 1_000_003 + first)
            prompts = [torch.tensor(row["prompt_ids"]) for row in rows[first : first + options.batch]]
            yield sample_rollouts(
                student, tokenizer, prompts, max_new_tokens=options.max_new_tokens, temperature=options.temperature
            )

    forks = find_forks(*pair, batches(), settings)
    if not forks:
        raise TOPDError(
            f"None of the {len(rows)} rollouts has a fork: no high-loss token's D_OT is above the upper quartile of "
            "the low-loss tokens. Look at more with --rollouts or --share, or see topd probe."
        )
    corrector = Corrector(
        student, pair, tokenizer, settings, is_right_on(options.data, rows), [len(row["prompt_ids"]) for row in rows],
        options.max_new_tokens,
    )  # fmt: skip
    run = CorrectRun(
        names["student"], names["teacher"], options.data, options.rollouts, options.max_new_tokens, settings,
        options.chat_template_kwargs,
    )  # fmt: skip
    run_correct(run, corrector, forks, tokenizer.decode, options.out)


def is_right_on(data: str, rows: list[dict[str, Any]]) -> Callable[[int, str], bool] | None:
    """Whether a text ends with the answer of its prompt; known for the embedded task."""
    from topd.embedded.task import DATA, is_correct

    if data not in DATA:
        return None

    return lambda rollout, text: is_correct(text, rows[rollout]["answer"])


class FromRecipe(argparse.Action):
    """`--config` of the analyses: pair, prompts, template and windows of a training run. Options after it win."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for name, value in recipe_options(values).items():
            if value is not None and hasattr(namespace, name):
                setattr(namespace, name, value)


def recipe_options(file: str) -> dict[str, Any]:
    """Options of the analyses by their names, from a YAML file of `topd train`.

    Raises:
        TOPDError: it cannot be read, or holds what `topd train` would refuse.
    """
    import torch

    from topd.cli.train import parse

    data, config, model = parse(["--config", file, *([] if torch.cuda.is_available() else ["--use_cpu", "true"])])
    return {
        "student": model.model_name_or_path,
        "teacher": config.teacher_model_name_or_path,
        "data": data.data,
        "split": data.data_split,
        "chat_template_kwargs": config.chat_template_kwargs or None,
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "window_length": [config.window_length],
        "share": config.candidate_share,
        "student_window": [config.student_window],
        "embedding": [config.embedding],
        "cost": [config.ground_cost],
        "seed": config.seed,
        "dtype": model.dtype,
    }
