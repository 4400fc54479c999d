"""The page: everything a run recorded, in one HTML file that loads nothing and needs nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topd.report.analysis_sections import correct_section, probe_section
from topd.report.distances import distance_figures
from topd.report.evaluation import evaluation_section, load_evaluations
from topd.report.figures import curve_figures
from topd.report.provenance import provenance_rows
from topd.report.reading import number
from topd.report.records import MAX_CANDIDATES, Arm
from topd.report.results import NAMES, Scores
from topd.report.rollouts import LEVELS, choose_rollouts
from topd.report.runs import Run, load_runs
from topd.report.study import study_section
from topd.report.words import signed
from topd.runs.files import write_text

_HERE = Path(__file__).parent
MOST_TOKENS = 30
"""Tokens offered in the filter, the most frequent candidates first."""


def write_report(run: Path, out: Path | None = None, compare: Sequence[Path] = ()) -> Path:
    """Write the report of a run folder and return where it is.

    Args:
        run: a demo folder (with `results.json`), one trainer output folder, or what an analysis wrote.
        out: the HTML file; by default `report.html` in `run`.
        compare: more runs, shown on the same axes.

    Raises:
        ReportError: if there is nothing to report, or the records are newer than this version of topd.
    """
    out = Path(run) / "report.html" if out is None else Path(out)
    html = render(load_runs([Path(run), *map(Path, compare)]))
    write_text(html, out)
    return out


def render(runs: Sequence[Run], *, limit: int = MAX_CANDIDATES) -> str:
    """The page as text, with at most `limit` candidates."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"svg": lambda figure: Markup(figure.svg), "signed": signed, "plural": plural, "slug": slug}
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    arms = [arm for run in runs for arm in run.arms]
    several = len(runs) > 1
    probed = [Arm("probe", rollouts=run.probe.rollouts, points=run.probe.points) for run in runs if run.probe]
    points = [point for arm in arms for point in arm.points]
    shown = choose_rollouts([*arms, *probed], limit)
    cards = [card for item in shown for card in item.cards.values()]
    notes = [note for run in runs for note in run.notes]
    models = load_evaluations([folder for run in runs for folder in run.evaluations], notes)
    return environment.get_template("template.html").render(
        title=listed([run.name for run in runs]),
        lede=lede(arms),
        notes=notes,
        facts=[fact for run in runs for fact in facts(run)],
        scores=[Scores.of(run, several) for run in runs if Scores.of(run, several).any],
        curves=curve_figures(arms),
        distances=distance_figures(points),
        probes=[probe_section(run.probe, i, of(run, several)) for i, run in enumerate(runs) if run.probe],
        corrections=[correct_section(run.correct, i, of(run, several)) for i, run in enumerate(runs) if run.correct],
        evaluation=evaluation_section(models) if models else None,
        studies=[study_section(run.study, i, of(run, several)) for i, run in enumerate(runs) if run.study],
        levels=LEVELS,
        shown=shown,
        cards=len(cards),
        kinds={kind: sum(card.candidate.kind == kind for card in cards) for kind in ("fork", "alarm", "unknown")},
        tokens=Counter(card.token for card in cards).most_common(MOST_TOKENS),
        futures=[card.alignment.data if card.alignment else None for card in cards],
        left_out=sum(len(arm.points) for arm in [*arms, *probed]) - len(cards),
        farthest=max([1.0] + [card.candidate.distance for card in cards if card.candidate.distance is not None]),
        arms=arms,
        provenance=provenance_rows(arms),
        options=option_rows(arms),
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def of(run: Run, several: bool) -> str:
    """What a heading adds where there are several runs."""
    return f": {run.name}" if several else ""


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def slug(title: str) -> str:
    """A title as an id."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def lede(arms: Sequence[Arm]) -> str:
    """What was trained, in a sentence or two."""
    parts = []
    if arms:
        methods = [arm.method for arm in arms]
        steps = sorted({arm.steps for arm in arms})
        span = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        names = " and ".join(NAMES.get(method, method) for method in dict.fromkeys(methods))
        parts.append(f"{names}, {span} {'step' if steps[-1] == 1 else 'steps'}{' each' if len(arms) > 1 else ''}.")
    audited = sum(arm.audited for arm in arms)
    kinds = [point.kind for arm in arms for point in arm.points]
    if audited:
        found = f"{plural(kinds.count('fork'), 'fork')} and {plural(kinds.count('alarm'), 'false alarm')}"
        unknown = f", {kinds.count('unknown'):,} without a distance" if "unknown" in kinds else ""
        among = f"among {plural(len(kinds), 'candidate')} in {plural(audited, 'audited rollout')}"
        parts.append(f"{found}{unknown}, {among}.")
    return " ".join(parts)


def facts(run: Run) -> list[tuple[str, str]]:
    """Seed, time and versions, as far as recorded."""
    seeds = {str(arm.options["seed"]) for arm in run.arms if arm.options.get("seed") is not None}
    seed = run.results.get("seed", ", ".join(sorted(seeds)) or None)
    seconds = number(run.results.get("seconds_total"))
    versions = run.results.get("versions")
    found = [("Seed", "" if seed is None else str(seed)), ("Total time", "" if seconds is None else duration(seconds))]
    found += [(str(name), str(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
    return [(name, value[:80]) for name, value in found if value]


def option_rows(arms: Sequence[Arm]) -> list[tuple[str, list[str], bool]]:
    """Option, its value in each arm, and whether they differ; those that differ first."""
    keys = sorted({key for arm in arms for key in arm.options})
    rows = []
    for key in keys:
        values = [json.dumps(arm.options[key], ensure_ascii=False) if key in arm.options else "–" for arm in arms]
        rows.append(
            (key, [value if len(value) <= 160 else f"{value[:160]}…" for value in values], len(set(values)) > 1)
        )
    return sorted(rows, key=lambda row: not row[2])


def plural(count: int, noun: str) -> str:
    """1 fork, 2 forks."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
