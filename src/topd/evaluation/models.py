"""Which model answered: a label for tables and folders, and a fingerprint that changes with its weights."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError

_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
_ENDS = 1 << 20
"""Bytes at each end of a file that are read: another training run changes them, and large files stay quick."""


def label_and_source(name: str) -> tuple[str, str]:
    """ "LABEL=SOURCE", or a source whose last part becomes the label. A label names a folder: it is never "..".

    Raises:
        TOPDError: the source has no last part.
    """
    if match := re.fullmatch(r"([\w-][\w.-]*)=(.+)", name):
        return match[1], match[2]
    label = Path(name.replace(":", "-")).name
    if label in ("", "..") and not (label := Path(os.path.abspath(name)).name):
        raise TOPDError(f"--model {name}: name it, as in --model my-model={name}.")
    return label, name


def labelled_models(names: list[str]) -> dict[str, str]:
    """Label -> source.

    Raises:
        TOPDError: two models would have the same label.
    """
    pairs = [label_and_source(name) for name in names]
    models = dict(pairs)
    for label, source in pairs:
        if label in ("", ".", ".."):
            raise TOPDError(f"--model {source}: its results need another name than {label!r}. Write NAME={source}.")
    if len(models) < len(pairs):
        raise TOPDError(
            f"Two models would be called the same ({', '.join(label for label, _ in pairs)}). Name them: "
            "--model opd=runs/a/checkpoint-100 --model topd=runs/b/checkpoint-100."
        )
    return models


def fingerprint(source: str) -> str | None:
    """Of a model's folder: from the names, sizes and both ends of its files. None for a Hub name."""
    folder = Path(resolve_model(source))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_ENDS))
            content.seek(max(0, size - _ENDS))
            digest.update(content.read(_ENDS))
    return digest.hexdigest()[:16]
