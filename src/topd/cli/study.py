"""`topd study`: the command. The study is in `study/`."""

import argparse
from dataclasses import replace
from pathlib import Path

from topd.cli.options import check_at_least_one
from topd.errors import TOPDError
from topd.runs.sole_writer import sole_writer


def add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML with models, arms and seeds, as in studies/")
    what.add_argument("--show", type=Path, metavar="study.json", help="print the tables of a finished study")
    parser.add_argument("--against", default="opd", metavar="ARM", help="with --show: the arm to compare with (opd)")
    parser.add_argument("--out", type=Path, help="output folder; run again to resume (default: runs/CONFIG)")
    parser.add_argument("--student", help="overrides the student of the config")
    parser.add_argument("--teacher", help="overrides the teacher of the config")
    parser.add_argument("--data", help="training prompts; overrides those of the config")
    parser.add_argument("--seeds", type=int, help="use only the first N seeds")
    parser.add_argument("--arms", nargs="+", help="only these arms (and opd, and arms whose time or tuning they use)")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs, each in a process with one thread")


def run(options: argparse.Namespace) -> None:
    from topd.study.config import REFERENCE, read_plan
    from topd.study.summary import print_tables, read_study

    if options.show:
        print_tables(read_study(options.show), options.against)
        return
    from topd.runs.console import silence_libraries
    from topd.study.command import run_study

    silence_libraries()
    check_at_least_one(options, "seeds", "workers")
    given = {name: getattr(options, name) for name in ("student", "teacher", "data") if getattr(options, name)}
    plan = read_plan(options.config, given)
    if options.seeds:
        plan = replace(plan, seeds=plan.seeds[: options.seeds])
    if options.arms:
        known = [arm.name for arm in plan.arms]
        unknown = [name for name in options.arms if name not in known]
        if unknown:
            raise TOPDError(f"There is no arm {unknown[0]!r} in {options.config}; available: {', '.join(known)}.")
        wanted = {REFERENCE, *options.arms}
        for needs in ("time_of", "tuned_as"):  # in this order: the arm whose time is matched may be tuned as another
            wanted |= {getattr(arm, needs) for arm in plan.arms if arm.name in wanted}
        plan = replace(plan, arms=tuple(arm for arm in plan.arms if arm.name in wanted))
    out = options.out or Path("runs") / options.config.stem
    with sole_writer(out):
        run_study(plan, out, options.workers)
