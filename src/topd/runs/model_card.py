"""The model card: TRL's draft, with the student's name and what the run was made of."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PAPER = {
    "title": "Bridging Reasoning Trajectories in On-Policy Distillation via Near-Future Guidance",
    "id": "2606.00305",
    "citation": textwrap.dedent("""\
        @article{jiang2026bridging,
            title  = {{Bridging Reasoning Trajectories in On-Policy Distillation via Near-Future Guidance}},
            author = {Yuxuan Jiang and Francis Ferraro},
            year   = 2026,
            eprint = {arXiv:2606.00305},
        }"""),
}
"""Of the method, as TRL's card cites it."""

HEADING = "## The run"
_NOBODY = "[None](https://huggingface.co/None)"


def complete_card(folder: Path, options: Mapping[str, Any], changed: list[str], provenance: Mapping[str, Any]) -> None:
    """Complete the `README.md` that TRL wrote into a run's folder; nothing where it wrote none."""
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    text = text.replace(_NOBODY, f"`{_name(provenance['student'])}`")
    before, framework, after = text.partition("### Framework versions")
    card.write_text(f"{before}{run_section(options, changed, provenance)}\n{framework}{after}", encoding="utf-8")


def run_section(options: Mapping[str, Any], changed: list[str], provenance: Mapping[str, Any]) -> str:
    """The run in Markdown: models, data, precision, versions, and the options that were set."""
    data, models = provenance["data"], {role: part for role, part in provenance.items() if _is_model(part)}
    rows = {role: f"`{_name(model)}`, {model['parameters']:,} parameters" for role, model in models.items()}
    rows["data"] = f"{_cell(options.get('data') or 'a dataset')}, {_count(data['rows'])}, digest `{data['digest']}`"
    rows["precision"] = ", ".join(f"{name}: {value}" for name, value in provenance["precision"].items())
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    given = {name: options[name] for name in options if name in set(changed)}
    dumped = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=120)
    return (
        f"{HEADING}\n\n| | |\n|---|---|\n{table}\n\nOptions (all of them are in `run.yaml`):\n\n```yaml\n{dumped}```\n"
    )


def _is_model(part: Any) -> bool:
    return isinstance(part, Mapping) and "weights" in part


def _name(model: Mapping[str, Any]) -> str:
    revision = f" at {model['revision']}" if model["revision"] else ""
    return f"{model['name']}{revision}".replace("`", "")


def _count(rows: int | None) -> str:
    return "a stream" if rows is None else f"{rows:,} rows"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
