"""Counts what someone reads to follow a step from rollouts to its loss: python docs/step_size.py

Statements, parameters and modules of the functions of `training/step.py` that a step of TOPD runs. The functions that
they call are not counted. `tests/documentation/test_documents.py` keeps the step short.
"""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
STEP = SOURCE / "topd" / "training" / "step.py"
PATH = ("look_ahead", "look_at", "look_from", "topd_loss")
"""From rollouts to candidates, windows, transport and forks; then the loss."""


def statements(function: ast.AST) -> int:
    """Statements in a function's body, nested ones too, without docstrings."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def functions() -> dict[str, tuple[int, int]]:
    """Name -> (statements, parameters) of each function on the way."""
    tree = ast.parse(STEP.read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name: (statements(found[name]), len(found[name].args.args)) for name in PATH}


def modules_behind(name: str = "topd.training.step") -> set[str]:
    """Modules of ours that a module imports at its start, directly or through others."""
    seen, left = set(), [name]
    while left:
        module = left.pop()
        file = SOURCE / (module.replace(".", "/") + ".py")
        file = file if file.is_file() else SOURCE / module.replace(".", "/") / "__init__.py"
        if module in seen or not file.is_file():
            continue
        seen.add(module)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("topd"):
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return seen - {name}


if __name__ == "__main__":
    counts = functions()
    for name, (count, parameters) in counts.items():
        print(f"{name:12} {count:3} statements, {parameters} parameters")
    print(f"{'together':12} {sum(count for count, _ in counts.values()):3} statements in {len(counts)} functions")
    behind = modules_behind()
    packages = {
        name: sum(f"topd.{name}." in each for each in behind) for name in ("algorithm", "near_future", "training")
    }
    print(f"{len(behind)} modules behind {STEP.name}: {packages}")
