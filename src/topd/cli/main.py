"""The `topd` command: the table of commands, and how each ends. Imports are lazy, so that help is quick."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

from topd.cli.check import ABOUT
from topd.cli.options import Parser
from topd.errors import RunInterrupted, TOPDError
from topd.runs.guard import guarded, output_may_close
from topd.runs.sole_writer import sole_writer
from topd.version import __version__
from topd.visible import visible

COMMANDS = {
    "generate": "teacher solutions for prompts, for the warm start (stage 1)",
    "warmstart": "stage 1, on teacher solutions: topd warmstart FILE.yaml [--option value ...]",
    "train": "distil a student from a teacher: topd train FILE.yaml [--option value ...]",
    "check": ABOUT,
    "demo": "distil the embedded student with OPD and with TOPD, and compare them",
    "probe": "which high-loss tokens of a pair are false alarms? No training",
    "correct": "does guidance at one fork bring the student closer? A few steps on single windows",
    "eval": "accuracy on benchmarks with intervals; compare models on the same problems",
    "study": "arms x seeds from the same student: does guidance help?",
    "merge": "merge a LoRA adapter into its base, and save the full model",
    "report": "write the HTML page of a run",
    "env": "versions, devices and CPU features, to paste into an issue",
    "case": "one fork of topd correct, token by token, as text and as an image",
}
"""Each is a module of this package. Those of `OWN_PARSER` have `main(words)`, the others `add_options` and `run`."""
OWN_PARSER = ("train", "warmstart", "check")
"""Their many options belong to TRL's parser."""
CONTINUES = ("train", "warmstart", "study", "demo")
"""Commands that continue when their output is closed."""
FILES = (".html", ".svg", ".png", ".pdf", ".jsonl", ".parquet")
"""Suffixes of `--out` where it names a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors end in one message and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    continues = words[:1] and words[0] in CONTINUES and not {"-h", "--help", "--help-all"} & set(words)
    with output_may_close(continues=bool(continues)):
        return _exit_status(words)


def _exit_status(words: list[str]) -> int:
    try:
        with guarded(None):
            return _run(words)
    except TOPDError as error:
        print(visible(f"topd: {error}"), file=sys.stderr)
        return 2
    except RunInterrupted as stopped:
        print(f"topd: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(
            "topd: interrupted. Files on disk are complete. Resume topd train with --resume_from_checkpoint true; topd "
            "probe, eval and generate resume when you run the same command again.",
            file=sys.stderr,
        )
        return 130


def _run(words: list[str]) -> int:
    if words[:1] and words[0] in OWN_PARSER:
        return int(import_module(f"topd.cli.{words[0]}").main(words[1:]))
    options = parser().parse_args(words)
    writes = getattr(options, "lock_out", False)
    out: Path | None = getattr(options, "out", None) or getattr(options, "run_folder", None)
    folder = out.parent if out is not None and out.suffix in FILES else out
    with guarded(folder, remove=writes), sole_writer(options.out) if writes else nullcontext():
        options.run(options)
    return 0


def parser() -> Parser:
    """The parser of all commands but those with their own."""
    top = Parser(
        prog="topd",
        description="Trajectory-aware on-policy distillation (TOPD, arXiv:2606.00305).",
        epilog="In option names hyphens and underscores are the same. On every command --student is "
        "--model_name_or_path, --teacher is --teacher_model_name_or_path, --max_new_tokens is --max_completion_length.",
    )
    top.add_argument("--version", action="version", version=f"topd {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if name not in OWN_PARSER:
            module = import_module(f"topd.cli.{name}")
            command.set_defaults(run=module.run)
            module.add_options(command)
    return top
