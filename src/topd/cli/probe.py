"""`topd probe`: from names to loaded models and token ids, also for `topd correct`. The analysis is in `analysis/`."""

import argparse
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from topd.cli.check import parsed
from topd.cli.data_options import FormArguments, add_form_options, form_of, source_of
from topd.cli.engines import DTYPES
from topd.cli.options import check_at_least_one, data_source, json_object, prompts
from topd.errors import TOPDError
from topd.lm.pair import DATA as LM_DATA
from topd.visible import visible

EMBEDDED = {"student": "embedded:long-student", "teacher": "embedded:long-teacher"}
EMBEDDED_DEFAULTS = {
    "embedded-long": {"window_length": [32], "share": 0.0225, "max_new_tokens": 224},
    "embedded": {"window_length": [16], "share": 0.06, "max_new_tokens": 64},
    **{name: {"window_length": [16], "share": 0.05, "max_new_tokens": 224} for name in LM_DATA},
}
"""Responses of the embedded tasks have about 145 or 60 tokens, those of the language-model pair 85. Other pairs have
the paper's K and share."""
DEFAULTS = {"window_length": [50], "share": 0.0225, "max_new_tokens": 2048}
STUDENT_WINDOWS = ("rollout", "candidate", "regenerated")
NOT_USED = (
    "model_revision", "teacher_model_revision", "model_init_kwargs", "teacher_model_init_kwargs", "teachers",
    "teacher_model_server_url", "teacher_system_prompt", "teacher_chat_template_kwargs", "top_p", "top_k", "min_p",
    "repetition_penalty", "generation_kwargs", "beta", "transport_solver",
)  # fmt: skip
"""Options of a run that change its models, rollouts or distances, and that the analyses do not have."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_pair_options(parser, out="runs/probe")
    parser.add_argument(
        "--embedding", nargs="+", default=["student"],
        help="embeddings for the ground cost, the main one first (default: %(default)s)",
        choices=("student", "teacher", "student_hidden", "teacher_hidden"),
    )  # fmt: skip
    parser.add_argument(
        "--given-responses", action="store_true",
        help="measure the column `response` (or `completion`) of --data instead of sampling",
    )  # fmt: skip
    parser.add_argument(
        "--student-window", nargs="+", default=["rollout"], choices=(*STUDENT_WINDOWS, "all"),
        help="what the student's window is, the main one first: the rollout's own next K tokens; the candidate token, "
        "then the student's greedy continuation; its greedy continuation of the prefix (default: rollout)",
    )  # fmt: skip
    parser.add_argument(
        "--candidate-ranking", default="reverse_kl", choices=("reverse_kl", "teacher_nll", "log_ratio"),
        help="what makes a position high-loss: the token loss, the teacher's NLL of the sampled token, or its log p_S "
        "- log p_T (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--cost", nargs="+", default=["cosine"], choices=("cosine", "sqeuclidean"))


def run(options: argparse.Namespace) -> None:
    from topd.analysis.probe import ProbeOptions
    from topd.analysis.probe_command import ProbeRun, run_probe
    from topd.loading.pair import load_pair
    from topd.near_future.model_parts import end_token_ids
    from topd.runs.console import silence_libraries

    silence_libraries()
    names = checked(options)
    student, teacher, tokenizer = load_pair(names["student"], names["teacher"], options.dtype)
    rows = token_ids(options, tokenizer, end_token_ids(student.generation_config, tokenizer), options.given_responses)
    if options.given_responses:
        options.rollouts = len(rows)
        for row in rows:
            row["response_ids"] = row["response_ids"][: options.max_new_tokens]
    check_length(rows, tokenizer, options, student, teacher)
    windows: Any = [kind for name in options.student_window for kind in (STUDENT_WINDOWS if name == "all" else [name])]
    probe_run = ProbeRun(
        names["student"], names["teacher"], options.data, options.rollouts, options.batch, options.max_new_tokens,
        options.temperature, options.given_responses,
        ProbeOptions(options.share, tuple(options.window_length), tuple(options.embedding), tuple(options.cost),
                     options.seed, options.candidate_ranking, tuple(dict.fromkeys(windows))),
        options.chat_template_kwargs, weights_of(names, student, teacher),
    )  # fmt: skip
    run_probe(probe_run, student, teacher, tokenizer, rows, options.out)


def add_pair_options(parser: argparse.ArgumentParser, out: str) -> None:
    """The options of both analyses: a pair, prompts, rollouts, windows."""
    parser.add_argument(
        "--config", action=FromRecipe, metavar="FILE",
        help="YAML file of topd train, for its pair, data, template options and windows; later options override it",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, default={}, metavar="JSON",
        help="chat template arguments, such as '{\"enable_thinking\": false}'; the same as in the run",
    )  # fmt: skip
    parser.add_argument(
        "--student",
        help=f"folder (also of a LoRA adapter), Hub name or embedded model (default: {EMBEDDED['student']})",
    )
    parser.add_argument("--teacher", help=f"the same (default: {EMBEDDED['teacher']})")
    parser.add_argument(
        "--data", nargs="+", help="prompts: files, folder or Hub dataset, as for topd train (default: the embedded "
        "task, for embedded models)",
    )  # fmt: skip
    add_form_options(parser)
    parser.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=128, help="number of rollouts (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rollouts measured together (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="tokens per rollout (default: 2048; embedded-long: 224)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: %(default)s)")
    parser.add_argument(
        "--window-length",
        type=int,
        nargs="+",
        help="K, tokens per window; the main one first (default: 50; embedded-long: 32)",
    )
    parser.add_argument("--share", type=float, help="share of positions that are candidates (default: 0.0225)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the models (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(out),
        help="output folder; run again to resume after an interruption (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(lock_out=True)


def checked(options: argparse.Namespace) -> dict[str, str]:
    """Fill in defaults that depend on the data, check ranges; return the models' names by role."""
    from topd.loading.data import source_name

    if (options.student is None) != (options.teacher is None):
        raise TOPDError("Name both --student and --teacher, or neither (the embedded pair).")
    names = {role: getattr(options, role) or EMBEDDED[role] for role in EMBEDDED}
    options.source = data_source(source_of(options.data), *names.values())
    options.data = source_name(options.source)
    for name, value in EMBEDDED_DEFAULTS.get(options.data, DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_at_least_one(options, "rollouts", "batch", "max_new_tokens")
    if not 0 < options.share <= 1 or min(options.window_length) < 1 or not 0 < options.temperature < math.inf:
        raise TOPDError("--share must be in (0, 1], --window-length at least 1, --temperature positive.")
    if not 0 <= options.seed < 2**32:
        raise TOPDError("--seed must be in [0, 2**32).")
    return names


def weights_of(names: dict[str, str], student: Any, teacher: Any) -> dict[str, str | None]:
    """A digest of each model's folder, or its commit on the Hub."""
    from topd.evaluation.run import fingerprint

    models = {"student": student, "teacher": teacher}
    return {role: fingerprint(names[role]) or model.config._commit_hash for role, model in models.items()}


def check_length(rows: list[dict[str, Any]], tokenizer: Any, options: Any, student: Any, teacher: Any) -> None:
    """Raise `ContextError` where the longest prompt leaves too little room."""
    from topd.loading.tokenizers import check_context

    most = max(rows, key=lambda row: len(row["prompt_ids"]))["prompt_ids"]
    check_context(
        len(most), tokenizer.decode(most), options.max_new_tokens, max(options.window_length),
        {"student": student.config, "teacher": teacher.config},
    )  # fmt: skip


def token_ids(
    options: argparse.Namespace, tokenizer: Any, ends: list[int], responses: bool = False
) -> list[dict[str, Any]]:
    """Prompts as token ids; messages go through the chat template. Given responses get an end token."""
    from topd.loading.prompts import closing_id, prompt_ids, solution_ids

    rows, template = [], options.chat_template_kwargs
    for row in prompts(options.source, options.split, options.rollouts, responses, form=form_of(options)):
        rows.append({"prompt_ids": prompt_ids(tokenizer, row["prompt"], template), "answer": row.get("answer")})
        if responses:
            closing = closing_id(tokenizer, ends, template, not isinstance(row["prompt"], str))
            rows[-1]["response_ids"] = solution_ids(tokenizer, row["prompt"], row["response"], template, closing)[1]
    return rows


class FromRecipe(argparse.Action):
    """`--config` of the analyses: sets the options below from a file of `topd train`. Options after it override."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parts = parsed(["--config", values])
        for name, value in recipe_options(*parts).items():
            if value is not None and hasattr(namespace, name):
                setattr(namespace, name, value)
        if unused := not_used(namespace, *parts[1:]):
            figures = f"{parser.prog} does not use {', '.join(unused)} of it; its figures are those of a run without"
            print(visible(f"topd: {values}: {figures}."), file=sys.stderr)


def not_used(namespace: Any, config: Any, model: Any) -> list[str]:
    """Options that a file of `topd train` sets, which would change what an analysis finds, and which it does not have.

    `namespace`: the analysis's options.
    """
    shared = {"student_window": "student_window", "embedding": "embedding", "ground_cost": "cost",
              "candidate_ranking": "candidate_ranking"}  # fmt: skip
    names = [*NOT_USED, *(name for name, own in shared.items() if not hasattr(namespace, own))]
    of = {name: model if name == "model_revision" else config for name in names}
    return [name for name, part in of.items() if getattr(part, name) != getattr(type(part), name)]


def recipe_options(data: Any, config: Any, model: Any) -> dict[str, Any]:
    """Options of the analyses by their names, from the parts of a YAML file that `topd train` takes."""
    return {
        "student": model.model_name_or_path,
        "teacher": config.teacher_model_name_or_path,
        "data": data.data,
        "split": data.data_split,
        **{option.name: getattr(data, option.name) for option in fields(FormArguments)},
        "chat_template_kwargs": config.chat_template_kwargs or None,
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "window_length": [config.window_length],
        "share": config.candidate_share,
        "student_window": [config.student_window],
        "candidate_ranking": config.candidate_ranking,
        "guidance_weight": config.guidance_weight,
        "embedding": [config.embedding],
        "cost": [config.ground_cost],
        "seed": config.seed,
        "dtype": model.dtype,
    }
