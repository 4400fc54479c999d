"""The embedded pairs: a teacher and students of each level, shipped with the package."""

from __future__ import annotations

from pathlib import Path

from topd.errors import TOPDError
from topd.lm.pair import PREFIX as LM
from topd.lm.pair import model_folder

PREFIX = "embedded:"
"""Prefix of embedded model names, such as `embedded:long-teacher`, which are accepted wherever a model is named."""

_MODELS = Path(__file__).parent / "models"


def pair_folder(role: str) -> Path:
    """Folder of an embedded model, such as "long-teacher" or "long-student"."""
    folder = _MODELS / role
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in _MODELS.glob("*/config.json"))) or "none"
        raise TOPDError(f"There is no embedded model {role!r}. Known: {known}. `topd demo build` makes them.")
    return folder


def resolve_model(name: str) -> str:
    """A model name for `from_pretrained`: `embedded:` and `lm:` names become folders, other names are unchanged."""
    if name.startswith(LM):
        return str(model_folder(name.removeprefix(LM)))
    return str(pair_folder(name.removeprefix(PREFIX))) if name.startswith(PREFIX) else name
