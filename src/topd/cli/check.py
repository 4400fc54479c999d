"""`topd check`: the options, and from them to the checks in `check/`; and what `topd train` asks of them first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from topd.errors import DataError, TOPDError
from topd.visible import visible

if TYPE_CHECKING:
    from topd.check.finding import Finding
    from topd.check.setup import Setup

EMBEDDED_RUN = {
    "model_name_or_path": "embedded:long-student", "teacher_model_name_or_path": "embedded:long-teacher",
    "data": "embedded-long", "max_completion_length": "224", "window_length": "32",
    "learning_rate": "3e-4", "bf16": "false",
}  # fmt: skip
"""What is checked where nothing is named: whether this installation is whole."""

ABOUT = "do student, teacher, data and machine fit? Every option of topd train may be given too"


def check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="topd check",
        description=f"Before a run: {ABOUT}. Without any: the embedded pair, to see whether the installation is whole. "
        "Exit status: 0 ready, 1 warnings and --strict, 2 errors.",
    )
    parser.add_argument("--student", help="folder, Hub name, or embedded one; as --model_name_or_path of topd train")
    parser.add_argument("--teacher", help="the same; as --teacher_model_name_or_path")
    parser.add_argument(
        "--server-alone", action="store_true",
        help="the run has no weights of the teacher: --teacher names what --teacher_window_server serves",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="leave out what needs the models' weights")
    parser.add_argument("--samples", type=int, default=16, help="rollouts to look at (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of these rollouts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    return parser


def run_check(argv: Sequence[str]) -> int:
    """Check what is named; the exit status."""
    own, others = check_parser().parse_known_args(argv)
    if own.samples < 1 or own.max_new_tokens < 1:
        raise TOPDError("--samples and --max-new-tokens must be at least 1.")
    for option, name in (("--model_name_or_path", own.student), ("--teacher_model_name_or_path", own.teacher)):
        others += [option, name] if name else []
    if not others:
        others = [f"--{option}={value}" for option, value in EMBEDDED_RUN.items()]

    from topd.check.checks import findings_on_models, quick_findings
    from topd.check.finding import worst
    from topd.runs.quiet import quieten

    quieten()
    data, config, model = parsed(others)
    if own.server_alone and config.teacher_window_server is None:
        raise TOPDError("--server-alone says that the teacher is on a server: --teacher_window_server URL.")
    setups = setups_of(data, config, model, teacher_here=not own.server_alone)
    if not setups:
        raise TOPDError(
            "The teacher is on a server alone. Name the model that it serves: --teacher NAME --server-alone."
        )
    findings = []
    for name, setup in setups.items():
        found = quick_findings(setup)
        if not (own.quick or own.server_alone) and worst(found) != "error":
            student, teacher = _models(setup)
            limit = min(own.max_new_tokens, setup.config.max_completion_length or own.max_new_tokens)
            found += findings_on_models(setup, student, teacher, own.samples, limit)
        findings += [replace(finding, check=f"{finding.check}{name and f' ({name})'}") for finding in found]
    show(findings, list(setups.values()), as_json=own.json)
    return {"ok": 0, "warning": 1 if own.strict else 0, "error": 2}[worst(findings)]


def parsed(argv: list[str]) -> tuple[Any, Any, Any]:
    """As `topd train` parses them, on the CPU where there is nothing else."""
    import torch

    from topd.cli.train import parse

    if not torch.cuda.is_available():
        argv = ["--use_cpu", "true", *argv]
    return parse(argv)


def setups_of(
    data: Any, config: Any, model: Any, dataset: Any = None, evaluation: Any = None, teacher_here: bool = True
) -> dict[str, Setup]:
    """Everything about a run that can be known without weights: by the teacher's name in the data, "" for an only one.

    Args:
        data, config, model: as `topd.cli.train.parse` returns them.
        dataset, evaluation: the prompts, and those of the evaluation loss, if they are loaded.
        teacher_here: whether its weights are; see `Setup`.

    Raises:
        TOPDError: something cannot be read.
    """
    from topd.check.setup import Setup, describe
    from topd.cli.arguments import data_source, prompts
    from topd.cli.train import named

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
    dataset = dataset if dataset is not None else prompts(data.data, data.data_split, data.data_limit)
    student = describe("student", name, trust, model.model_revision)
    return {
        key: Setup(
            student,
            describe("teacher", teacher, trust, config.teacher_model_revision),
            config,
            dataset["prompt"][:],
            dataset["answer"][:] if "answer" in dataset.column_names else [None] * len(dataset),
            data.data,
            {role: dtype or "auto" for role, dtype in dtypes.items()},
            adapters=model.use_peft,
            teacher_here=teacher_here,
            model=model,
            evaluation=_evaluation(data) if evaluation is None else len(evaluation),
        )
        for key, teacher in teachers.items()
    }


def _evaluation(data: Any) -> int | DataError | None:
    """Number of prompts for the evaluation loss, or why they cannot be read; None where none are named."""
    from topd.cli.arguments import prompts

    try:
        return len(prompts(data.eval_data, data.data_split, data.data_limit)) if data.eval_data else None
    except DataError as error:
        return error


def before_training(data: Any, config: Any, model: Any, dataset: Any, evaluation: Any = None) -> None:
    """The quick checks, as `topd train` begins: warnings are shown, errors stop it.

    Raises:
        TOPDError: at least one error; `--preflight false` trains nevertheless.
    """
    from topd.check.checks import errors_in_words, quick_findings
    from topd.check.finding import worst

    setups = setups_of(data, config, model, dataset, evaluation)
    findings = dict.fromkeys(finding for setup in setups.values() for finding in quick_findings(setup))
    if worst(list(findings)) == "error":
        raise TOPDError(f"{errors_in_words(list(findings))}\n--preflight false trains nevertheless.")
    if config.should_log:
        for finding in findings:
            if finding.verdict == "warning" and finding.check != "precision":  # the trainer says that itself
                print(visible(f"topd: {finding.check}: {finding.found}. {finding.remedy}"), file=sys.stderr)


def show(findings: list[Finding], setups: list[Setup], *, as_json: bool) -> None:
    from rich.console import Console

    from topd.check.table import findings_json, findings_table, verdict_line

    if as_json:
        print(findings_json(findings))
        return
    console = Console()
    teachers = ", ".join(setup.teacher.name for setup in setups)
    console.print(findings_table(findings, f"{setups[0].student.name} from {teachers}, {setups[0].data}"))
    console.print(verdict_line(findings), markup=False, highlight=False)


def _models(setup: Setup) -> tuple[Any, Any]:
    from topd.cli.analyses import load_pair

    dtype = setup.dtypes["student"]
    student, teacher, _ = load_pair(setup.student.folder, setup.teacher.folder, dtype)
    return student, teacher
