"""The pair by name: `lm:teacher`, `lm:student` and `lm:base` are built once from the base model and small adapters."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from topd.errors import TOPDError
from topd.lm.base import INSTALL, write_base

PREFIX = "lm:"
"""Prefix of the pair's model names, which are accepted wherever a model is named."""
ROLES = ("base", "student", "teacher")

_HERE = Path(__file__).parent
DATA = {
    "lm": "prompts", "lm-held-out": "held_out", "lm-unseen": "unseen", "lm-tuning": "tuning",
}  # fmt: skip
"""Prompts to train on; held-out problems of the templates that both models know, and of templates that neither knows;
and problems for tuning. All have answers."""


def data_file(name: str) -> str:
    """The file of the pair's prompts or problems; any other name is returned as it is.

    Raises:
        TOPDError: the files are not here: they are in the repository, not in the wheel.
    """
    if name not in DATA:
        return name
    file = _HERE / "data" / f"{DATA[name]}.jsonl"
    if not file.is_file():
        raise TOPDError(f"The data {name!r} are in the repository, not in the wheel: run this from a clone.")
    return str(file)


def model_folder(role: str) -> Path:
    """The folder of `lm:ROLE`; on first use it is built in the cache of Hugging Face (538 MB each, float32).

    Raises:
        TOPDError: an unknown role, or what it is built from is missing.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME

    adapter = _HERE / "adapters" / role / "adapter_model.safetensors"
    if role not in ROLES:
        raise TOPDError(f"There is no model lm:{role}. Known: {', '.join(PREFIX + each for each in ROLES)}.")
    if role != "base" and not adapter.is_file():
        raise TOPDError(f"The adapter of lm:{role} is in the repository, not in the wheel: run this from a clone.")
    version = "1" if role == "base" else hashlib.sha256(adapter.read_bytes()).hexdigest()[:12]
    folder = Path(HF_HOME) / "topd" / f"lm-{role}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            if role == "base":
                write_base(unfinished)
            else:
                write_merged(model_folder("base"), adapter.parent, unfinished)
            unfinished.rename(folder)
    return folder


def write_merged(base: Path, adapter: Path, folder: Path) -> None:
    """Write the base with the adapter merged into it (float32), and its tokenizer."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise TOPDError(f"The language-model pair needs peft: {INSTALL}") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
