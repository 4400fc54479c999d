"""The command: run cases, print one table, write one JSON file.

The file is a list of rows, each complete in itself: `Row`'s fields, the load average when it was taken, and where the
run was (hardware, versions, threads, command, commit). It is rewritten after every row, so nothing finished is lost.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import CASES, Size
from benchmarks.environment import environment, load_average, plain, say
from benchmarks.row import Row
from benchmarks.table import markdown, print_table
from topd.runs.files import write_json


def main(arguments: list[str] | None = None) -> int:
    """0 when measured; 1 with `--strict` when a gate or a case failed; 2 when asked for what there is not."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text())))
        return 0
    if options.list:
        for name, module in CASES.items():
            print(f"{name:12} {_first_line(module)}")
        return 0
    warnings.filterwarnings("ignore")
    about = environment(arguments)
    say(f"threads {about['threads']['torch']}, load average {load_average()}, {about['hardware']['cpu']}")
    size: Size = "tiny" if options.tiny else "quick" if options.quick else "full"
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    for name in options.case or CASES:
        started = time.perf_counter()
        for row in run_case(name, size):
            rows.append(row)
            records.append(asdict(row) | {"load_average": load_average()} | about)
            write(records, options.out)
        say(f"{name}: {time.perf_counter() - started:.0f} s")
    print_table(rows)
    print(f"{len(rows)} rows in {options.out}")
    return int(options.strict and any(row.ok is False for row in rows))


def run_case(name: str, size: Size) -> Iterable[Row]:
    """Its rows as they come; where it raises, one more that says why."""
    try:
        yield from importlib.import_module(CASES[name]).rows(size)
    except Exception as error:  # one case's failure is a row; the other cases go on
        yield Row(name, "", ok=False, error=plain(error))


def write(records: list[dict[str, Any]], path: Path) -> None:
    """Replace the file at once: a reader, or an interrupt, never finds half of it."""
    write_json(records, path)


def _first_line(module: str) -> str:
    """Of the module's docstring, without the seconds that importing its peers takes."""
    spec = importlib.util.find_spec(module)
    source = Path(str(spec and spec.origin)).read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Benchmarks beside public peers.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"), help="the JSON file (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="every case at smaller sizes")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be given again")
    parser.add_argument("--list", action="store_true", help="the cases, one a line")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a gate or a case fails")
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="print an earlier run as Markdown")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in options.case or ():
        if name not in CASES:
            parser.error(f"no case named {name!r}; there are {', '.join(CASES)}")
    if options.markdown is not None and not options.markdown.is_file():
        parser.error(f"--markdown: no file {options.markdown}; it is what an earlier run wrote (--out)")
    return options


if __name__ == "__main__":
    sys.exit(main())
