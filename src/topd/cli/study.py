"""`topd study`: the command. The study is in `study/`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.runs.sole_writer import sole_writer


def add_study(commands: Any) -> None:
    """The command's options."""
    study = commands.add_parser("study", help="arms x seeds from the same student: does guidance help?")
    what = study.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML with arms and seeds, as in studies/")
    what.add_argument("--show", type=Path, metavar="study.json", help="print the tables of a study that has been run")
    study.add_argument("--against", default="opd", metavar="ARM", help="with --show: the arm to compare with (opd)")
    study.add_argument("--out", type=Path, help="folder; start again to go on (default: runs/NAME of the config)")
    study.add_argument("--seeds", type=int, help="only the first so many seeds")
    study.add_argument("--arms", nargs="+", help="only these arms (and opd, and those whose time they get)")
    study.add_argument("--workers", type=int, default=1, help="runs at a time, each in a process with one thread")
    study.set_defaults(run=run_study_command)


def run_study_command(options: argparse.Namespace) -> None:
    """Read, choose, run."""
    from dataclasses import replace

    from topd.study.command import run_study
    from topd.study.config import REFERENCE, read_plan
    from topd.study.tables import print_tables, read_study

    if options.show:
        print_tables(read_study(options.show), options.against)
        return
    plan = read_plan(options.config)
    for name in ("seeds", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise TOPDError(f"--{name} must be at least 1; got {getattr(options, name)}.")
    if options.seeds:
        plan = replace(plan, seeds=plan.seeds[: options.seeds])
    if options.arms:
        known = [arm.name for arm in plan.arms]
        unknown = [name for name in options.arms if name not in known]
        if unknown:
            raise TOPDError(f"There is no arm {unknown[0]!r} in {options.config}; there are: {', '.join(known)}.")
        wanted = {REFERENCE, *options.arms, *(arm.time_of for arm in plan.arms if arm.name in options.arms)}
        plan = replace(plan, arms=tuple(arm for arm in plan.arms if arm.name in wanted))
    out = options.out or Path("runs") / options.config.stem
    with sole_writer(out):
        run_study(plan, out, options.workers)
