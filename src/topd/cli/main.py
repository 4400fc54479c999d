"""The `topd` command. Imports are lazy: help and version answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from topd.cli.analyses import add_correct, add_probe
from topd.cli.check import ABOUT, before_training, run_check
from topd.cli.eval import add_eval
from topd.cli.generate import add_generate
from topd.cli.study import add_study
from topd.errors import RunInterrupted, TOPDError
from topd.runs.closed_pipe import output_may_close
from topd.runs.guard import guarded
from topd.runs.sole_writer import sole_writer
from topd.version import __version__
from topd.visible import visible

TRAINING = ("train", "warmstart", "study", "demo")
"""Commands that go on when nobody reads their output any more."""
FILES = (".html", ".svg", ".png", ".pdf", ".jsonl", ".parquet")
"""Endings of what `--out` names where it is no folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors end in one message and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with output_may_close(goes_on=bool(arguments) and arguments[0] in TRAINING):
        return _outcome(arguments)


def _outcome(arguments: list[str]) -> int:
    """The exit status."""
    try:
        with guarded(None):
            return _run(arguments)
    except TOPDError as error:
        print(visible(f"topd: {error}"), file=sys.stderr)
        return 2
    except RunInterrupted as stopped:
        print(f"topd: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(
            "topd: interrupted. What was written is whole. topd train goes on with --resume_from_checkpoint true, "
            "topd probe, topd eval and topd generate when they are started again.",
            file=sys.stderr,
        )
        return 130


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["train"]:  # its many options belong to TRL's parser
        from topd.cli.train import run as train

        train(arguments[1:], before=before_training)
    elif arguments[:1] == ["check"]:  # it takes them too
        return run_check(arguments[1:])
    elif arguments[:1] == ["warmstart"]:
        from topd.cli.warmstart import run as warm_start

        warm_start(arguments[1:])
    else:
        options = _parser().parse_args(arguments)
        alone = sole_writer(options.out) if getattr(options, "alone", False) else nullcontext()
        with guarded(_folder(options)), alone:
            options.run(options)
    return 0


def _folder(options: argparse.Namespace) -> Path | None:
    """Where a command writes."""
    out: Path | None = getattr(options, "out", None) or getattr(options, "run_folder", None)
    return out.parent if out is not None and out.suffix in FILES else out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="topd",
        description="Trajectory-aware on-policy distillation (TOPD, arXiv:2606.00305).",
    )
    parser.add_argument("--version", action="version", version=f"topd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_generate(commands)
    commands.add_parser("warmstart", help="stage 1, on teacher solutions: --config FILE.yaml [--any_option value]")
    commands.add_parser("train", help="distil a student from a teacher: --config FILE.yaml [--any_option value]")

    commands.add_parser("check", help=ABOUT)

    demo = commands.add_parser("demo", help="distil the embedded student by OPD and by TOPD, and compare")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a shorter run, at most two minutes")
    demo.add_argument("--seed", type=int, default=0, help="seed of prompts and sampling (default: %(default)s)")
    demo.add_argument("--steps", type=int, help="optimizer steps of each arm")
    demo.set_defaults(run=_demo, alone=True)
    builds = demo.add_subparsers(metavar="build", required=False)
    build = builds.add_parser("build", help="train the embedded models anew (about two hours on one core)")
    build.add_argument("--out", type=Path, required=True, help="folder for the models")
    build.add_argument("--only", metavar="NAME", help="build only this one, such as long-student")
    build.set_defaults(run=_demo_build)

    add_probe(commands)
    add_correct(commands)
    add_eval(commands)
    add_study(commands)

    report = commands.add_parser("report", help="write the HTML page of a run")
    report.add_argument(
        "run_folder", type=Path, metavar="RUN", help="folder that topd demo, train, eval, study, probe or correct wrote"
    )
    report.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN2", help="more of them, on the same axes"
    )
    report.add_argument("--out", type=Path, help="where to write (default: RUN/report.html)")
    report.set_defaults(run=_report)

    case = commands.add_parser("case", help="one fork of topd correct, token by token, as text and as a picture")
    case.add_argument("run_folder", type=Path, metavar="RUN", help="folder that topd correct wrote")
    case.add_argument("--fork", type=int, help="which, from 1 (default: the typical one)")
    case.add_argument("--out", type=Path, help="picture: .svg, .png or .pdf (default: RUN/case.svg)")
    case.set_defaults(run=_case)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from topd.demo.run import run_demo

    run_demo(options.out, quick=options.quick, seed=options.seed, steps=options.steps)


def _demo_build(options: argparse.Namespace) -> None:
    from topd.demo.build import build

    build(options.out, options.only)


def _report(options: argparse.Namespace) -> None:
    for folder in (options.run_folder, *options.compare):
        if not folder.is_dir():
            raise TOPDError(
                f"{folder}: there is no such folder. Give one that topd demo, train, eval, study, probe or "
                "correct wrote."
            )
    from topd.report.page import write_report

    print(f"Wrote {write_report(options.run_folder, options.out, options.compare)}")


def _case(options: argparse.Namespace) -> None:
    from rich.console import Console

    from topd.report.case import draw_case, load_case, print_case

    fork, case = load_case(options.run_folder, options.fork)
    print_case(case, Console())
    print(f"Wrote {draw_case(case, options.out or options.run_folder / 'case.svg')} (fork {fork}).")


if __name__ == "__main__":
    raise SystemExit(main())
