"""Writes docs/options.md from the fields of the option classes: python docs/options_page.py"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from topd.cli.data_options import FormArguments
from topd.cli.train import DataArguments
from topd.cli.warmstart import SolutionArguments
from topd.training import TOPDConfig
from topd.warmstart import WarmStartConfig

PAGE = Path(__file__).with_name("options.md")
SECTIONS = {
    "method": "Method and windows",
    "candidate_ranking": "Candidates",
    "opd_loss": "Plain OPD and overhead",
    "num_iterations": "Rollouts",
    "teacher_model_server_url": "A teacher on a server",
    "teacher_system_prompt": "The teacher's own prompt",
    "embedding": "Transport",
    "fork_rule": "Forks",
    "guidance_weight": "Guidance",
    "cap_false_alarms": "Capping",
    "teachers": "Several teachers",
    "eval_benchmark": "Accuracy on held-out problems",
    "audit_steps": "Records",
}
"""Headings of `TOPDConfig`'s options, by the first option under each."""

OTHERS: dict[str, Any] = {
    "`topd train`: data": DataArguments,
    "`topd train`, `topd warmstart`: the form of the data": FormArguments,
    "`WarmStartConfig`: stage 1": WarmStartConfig,
    "`topd warmstart`: data": SolutionArguments,
}

INTRODUCTION = """\
<!-- Made by docs/options_page.py. Do not edit: change the help of the option, and run it again. -->
# Options

You can set every option in the YAML file (`--config`) and on the command line, which overrides the file:
`topd train --config MY.yaml --window_length 32`. In Python they are arguments of `TOPDConfig`. All other options are
those of TRL's `DistillationConfig` and transformers' `TrainingArguments`; `topd train --help-all` lists them.

**Source** is where the default comes from. "paper": arXiv:2606.00305. "our choice": the paper does not give it. If both
are named, the text tells which is which. "–": not part of the paper's method (another rule, a control, hardware,
records). Losses are in nats, distances in units of the ground cost. Formulas and code:
[paper_to_code.md](paper_to_code.md).
"""
OF_THE_PAPER = re.compile(r"Paper:|Paper \(|paper\)|the paper\b(?! does not| has)|The paper gives|paper's|sections? \d")


def options_page() -> str:
    """The whole page."""
    sections: dict[str, list[str]] = {}
    heading = ""
    for option in _own(TOPDConfig):
        heading = SECTIONS.get(option.name, heading)
        sections.setdefault(f"### {heading}", []).append(_row(option, TOPDConfig))
    tables = [_table(heading, rows) for heading, rows in sections.items()]
    for heading, kind in OTHERS.items():
        tables.append(_table(f"## {heading}", [_row(option, kind) for option in _own(kind)]))
    return "\n".join([INTRODUCTION, "## `TOPDConfig`: the method\n", *tables])


def _own(kind: Any) -> list[Field[Any]]:
    """The options that a class brings itself."""
    return [option for option in fields(kind) if option.name in kind.__annotations__]


def _table(heading: str, rows: list[str]) -> str:
    return "\n".join([f"{heading}\n", "| option | default | what it is | source |", "|---|---|---|---|", *rows, ""])


def _row(option: Field[Any], kind: Any) -> str:
    assert option.default is not MISSING, option.name
    told = option.metadata["help"].replace("|", "\\|")
    values = _values(get_type_hints(kind)[option.name])
    return f"| `{option.name}` | {_shown(option.default)} | {told}{values} | {_source(told)} |"


def _shown(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "none", True: "true", False: "false"}[default]
    return f"`{default}`" if isinstance(default, str) else str(default)


def _values(hint: Any) -> str:
    """The values that are allowed, where they are few."""
    if get_origin(hint) is not Literal:
        return ""
    return f" One of {', '.join(f'`{value}`' for value in get_args(hint))}."


def _source(told: str) -> str:
    paper, ours = bool(OF_THE_PAPER.search(told)), "our choice" in told.lower()
    return ", ".join(name for name, holds in (("paper", paper), ("our choice", ours)) if holds) or "–"


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
