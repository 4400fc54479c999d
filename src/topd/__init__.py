"""TOPD: trajectory-aware on-policy distillation (arXiv:2606.00305). This module is the public surface.

`TOPDConfig` and `TOPDTrainer` run the method on TRL; the functions of `topd.algorithm` are the method itself. The names
are listed in `__init__.pyi`, where type checkers and editors read them. Each is imported on first use, so `import topd`
does not import torch.
"""

import ast
from importlib import import_module
from pathlib import Path

_HOME = {
    alias.name: str(statement.module)
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}
"""Name -> the module that defines it."""

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'topd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
