"""The `topd` command. Imports are lazy: help and version answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from topd.analysis_cli import add_correct, add_probe
from topd.errors import TOPDError
from topd.eval_cli import add_eval
from topd.version import __version__
from topd.warmstart_cli import add_generate


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can mend end in one message and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:  # its many options belong to TRL's parser
            from topd.training.command import run

            run(arguments[1:])
        elif arguments[:1] == ["warmstart"]:
            from topd.warmstart.command import run

            run(arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.run(options)
    except TOPDError as error:
        print(f"topd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "topd: interrupted. What was written is whole. topd train goes on with --resume_from_checkpoint true, "
            "topd probe, topd eval and topd generate when they are started again.",
            file=sys.stderr,
        )
        return 130
    return 0


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

    demo = commands.add_parser("demo", help="distil the embedded student by OPD and by TOPD, and compare")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a shorter run, at most two minutes")
    demo.add_argument("--seed", type=int, default=0, help="seed of prompts and sampling (default: %(default)s)")
    demo.add_argument("--steps", type=int, help="optimizer steps of each arm")
    demo.add_argument(
        "--difficulty", choices=("easy", "standard", "hard"), default="standard", help="which embedded student"
    )
    demo.set_defaults(run=_demo)
    builds = demo.add_subparsers(metavar="build", required=False)
    build = builds.add_parser("build", help="train the embedded models anew (about an hour on one core)")
    build.add_argument("--out", type=Path, required=True, help="folder for the models")
    build.add_argument("--only", choices=("teacher", "students"), help="build only these")
    build.set_defaults(run=_demo_build)

    add_probe(commands)
    add_correct(commands)
    add_eval(commands)

    report = commands.add_parser("report", help="write the HTML page of a run")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="folder that `topd demo` or `topd train` wrote")
    report.add_argument("--out", type=Path, help="where to write (default: RUN/report.html)")
    report.set_defaults(run=_report)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from topd.demo.run import run_demo

    run_demo(options.out, quick=options.quick, seed=options.seed, steps=options.steps, difficulty=options.difficulty)


def _demo_build(options: argparse.Namespace) -> None:
    from topd.demo.build import build

    build(options.out, (options.only,) if options.only else ("teacher", "students"))


def _report(options: argparse.Namespace) -> None:
    if not options.run_folder.is_dir():
        raise TOPDError(f"{options.run_folder}: there is no such folder. Give one that topd demo or topd train wrote.")
    try:
        from topd.report.page import write_report
    except ImportError as error:
        raise TOPDError(f"The report needs {error.name}: pip install 'topd[report]'.") from error
    print(f"Wrote {write_report(options.run_folder, options.out)}")


if __name__ == "__main__":
    raise SystemExit(main())
