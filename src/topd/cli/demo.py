"""`topd demo` and `topd demo build`: the commands. The demo is in `demo/`."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a shorter run: 6 steps, 150 held-out problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and sampling (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each arm")
    parser.set_defaults(lock_out=True)
    builds = parser.add_subparsers(metavar="build", required=False)
    build = builds.add_parser("build", help="train the embedded models again (about two hours on one core)")
    build.add_argument("--out", type=Path, required=True, help="folder for the models")
    build.add_argument("--only", metavar="NAME", help="build only this one, such as long-student")
    build.set_defaults(run=_build)


def run(options: argparse.Namespace) -> None:
    from topd.demo.run import run_demo

    run_demo(options.out, quick=options.quick, seed=options.seed, steps=options.steps)


def _build(options: argparse.Namespace) -> None:
    from topd.demo.build import build

    build(options.out, options.only)
