"""Benchmarks beside public peers: `python -m benchmarks --out FILE.json [--quick] [--case NAME] [--list]`.

A case is a module here with a function `rows(size)` that yields `Row`s; `size` is "full", "quick" or "tiny" (tests).
Its docstring says what is timed and what the sides are. It checks parity before it times anything. To add a case,
write the module and name it in `CASES`.
"""

from typing import Literal

Size = Literal["tiny", "quick", "full"]
"""full: minutes a case. quick: every case, some minutes in all. tiny: seconds, for the tests."""

CASES: dict[str, str] = {
    "loss": "benchmarks.loss",
    "gradient": "benchmarks.gradient",
    "opd": "benchmarks.opd",
    "step": "benchmarks.step",
    "updates": "benchmarks.updates",
    "windows": "benchmarks.windows",
    "packed": "benchmarks.packed",
    "transport": "benchmarks.transport",
    "growth": "benchmarks.growth",
    "lm": "benchmarks.lm",
    "cuda": "benchmarks.cuda",
}
"""Name to module, imported only when it runs. Order is that of the table."""
