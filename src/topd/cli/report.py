"""`topd report`: the command. The page is in `report/`."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="folder that topd demo, train, eval, study, probe or correct wrote"
    )
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN2", help="more such folders, on the same axes"
    )
    parser.add_argument("--out", type=Path, help="output file (default: RUN/report.html)")


def run(options: argparse.Namespace) -> None:
    from topd.report.page import write_report

    print(f"Wrote {write_report(options.run_folder, options.out, options.compare)}")
