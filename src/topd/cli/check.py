"""`topd check`: from options to the checks in `check/`, without and with the models' weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from topd.cli.options import Parser, check_at_least_one
from topd.errors import TOPDError

ABOUT = "do student, teacher, data and machine fit together? Takes every option of topd train"


def check_parser() -> Parser:
    """The command's own options; `topd train` has the others."""
    parser = Parser(
        prog="topd check", allow_abbrev=False,
        description=f"Before a run: {ABOUT}: --student, --teacher, --data, ... Without options it checks the embedded "
        "pair, to test the installation. Exit status: 0 passed, 1 warnings and --strict, 2 errors.",
    )  # fmt: skip
    parser.synonyms = False  # --max_completion_length is the run's, --max-new-tokens the check's
    parser.add_argument(
        "--server-alone", action="store_true",
        help="the teacher is on a server only: --teacher names the model that --teacher_model_server_url serves",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="skip the checks that need the models' weights")
    parser.add_argument("--samples", type=int, default=16, help="rollouts to sample (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens per rollout (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--strict", action="store_true", help="warnings give exit status 1")
    return parser


def main(argv: Sequence[str]) -> int:
    """Check the pair, data and machine; the exit status."""
    own, others = check_parser().parse_known_args(argv)
    check_at_least_one(own, "samples", "max_new_tokens")
    if not others:
        others = ["--config", "recipe:embedded-long"]

    from rich.console import Console

    from topd.check.checks import findings_on_models, quick_findings
    from topd.check.findings import findings_json, findings_table, verdict_line, worst
    from topd.cli.train import setups_of
    from topd.loading.pair import load_pair
    from topd.runs.console import silence_libraries

    silence_libraries()
    data, config, model = parsed(others)
    if own.server_alone and config.teacher_model_server_url is None:
        raise TOPDError("--server-alone says that the teacher is on a server: add --teacher_model_server_url URL.")
    setups = setups_of(data, config, model, teacher_here=not own.server_alone)
    if not setups:
        raise TOPDError(
            "The teacher is on a server only. Specify the model that it serves: --teacher NAME --server-alone."
        )
    findings = []
    for name, setup in setups.items():
        found = quick_findings(setup)
        if not (own.quick or own.server_alone) and worst(found) != "error":
            student, teacher, _ = load_pair(setup.student.folder, setup.teacher.folder, setup.dtypes["student"])
            limit = min(own.max_new_tokens, setup.config.max_completion_length or own.max_new_tokens)
            found += findings_on_models(setup, student, teacher, own.samples, limit)
        findings += [replace(finding, check=f"{finding.check}{name and f' ({name})'}") for finding in found]
    if own.json:
        print(findings_json(findings))
    else:
        console, first = Console(), next(iter(setups.values()))
        teachers = ", ".join(setup.teacher.name for setup in setups.values())
        console.print(findings_table(findings, f"{first.student.name} from {teachers}, {first.data}"))
        console.print(verdict_line(findings), markup=False, highlight=False)
    return {"ok": 0, "warning": 1 if own.strict else 0, "error": 2}[worst(findings)]


def parsed(argv: Sequence[str]) -> tuple[Any, Any, Any]:
    """The options of `topd train`, on the CPU where there is no CUDA device."""
    import torch

    from topd.cli.train import parse

    return parse(argv if torch.cuda.is_available() else ["--use_cpu", "true", *argv])
