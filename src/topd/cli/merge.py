"""`topd merge`: a LoRA adapter and its base as one whole model."""

import argparse
import shutil
from pathlib import Path

from topd.cli.engines import DTYPES
from topd.errors import TOPDError
from topd.visible import visible


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder that PEFT or topd train saved")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES,
        help="dtype of the merged weights (default: auto, that of the base)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    from topd.loading.adapters import base_of, is_adapter
    from topd.loading.models import loaded_model
    from topd.runs.checkpoints import saving
    from topd.runs.console import silence_libraries
    from topd.runs.files import PART
    from topd.runs.guard import TRACEBACK

    adapter, out = str(options.adapter), options.out
    if not is_adapter(adapter):
        raise TOPDError(f"{adapter} is not an adapter folder: it needs an adapter_config.json, and no config.json.")
    base = base_of(adapter)
    new, aside = not out.exists(), out / PART
    if not new and (not out.is_dir() or {path.name for path in out.iterdir()} - {TRACEBACK, PART}):
        raise TOPDError(f"--out {out} is not an empty folder: use a new one.")
    silence_libraries()
    shutil.rmtree(aside, ignore_errors=True)  # of a killed merge
    try:
        aside.mkdir(parents=True)  # reports a folder that cannot be written before the models are loaded
        whole = loaded_model(adapter, options.dtype)
        with saving(f"The merged model in {out}", out):
            for part in whole:
                part.save_pretrained(aside)
            files = sorted(aside.iterdir(), key=lambda file: file.name == "config.json")  # last: then it is a model
            for file in files:
                file.rename(out / file.name)
            (out / TRACEBACK).unlink(missing_ok=True)  # of a merge that failed
            new = False
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if new and out.is_dir():
            out.rmdir()
    print(visible(f"{adapter} merged into {base}: {out}"))
