"""`topd case`: the command. The case study is in `report/`."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder that topd correct wrote")
    parser.add_argument("--fork", type=int, help="number of the fork, from 1 (default: the median one)")
    parser.add_argument("--out", type=Path, help="image file: .svg, .png or .pdf (default: RUN/case.svg)")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from topd.report.case import draw_case, load_case, print_case

    fork, case = load_case(options.run_folder, options.fork)
    print_case(case, Console())
    print(f"Wrote {draw_case(case, options.out or options.run_folder / 'case.svg')} (fork {fork}).")
