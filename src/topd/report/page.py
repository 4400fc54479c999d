"""The page: everything a run recorded, in one HTML file that loads nothing and needs nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topd.report.distances import distance_figures
from topd.report.figures import curve_figures
from topd.report.reading import number
from topd.report.records import MAX_CANDIDATES, Arm, Run, load_run
from topd.report.results import NAMES, difference_row, headlines, problems, score_rows, signed
from topd.report.rollouts import LEVELS, choose_rollouts

_HERE = Path(__file__).parent


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder and return where it is.

    Args:
        run: a demo folder (with `results.json`) or one trainer output folder.
        out: the HTML file; by default `report.html` in `run`.

    Raises:
        ReportError: if there is nothing to report, or the records are newer than this version of topd.
    """
    out = Path(run) / "report.html" if out is None else Path(out)
    html = render(load_run(Path(run)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8", newline="\n")
    return out


def render(run: Run, *, limit: int = MAX_CANDIDATES) -> str:
    """The page as text, with at most `limit` candidates."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"svg": lambda figure: Markup(figure.svg), "signed": signed, "plural": plural}
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    points = [point for arm in run.arms for point in arm.points]
    shown = choose_rollouts(run.arms, limit)
    cards = sum(len(item.cards) for item in shown)
    return environment.get_template("template.html").render(
        title=run.name,
        lede=lede(run),
        notes=run.notes,
        facts=facts(run),
        headlines=headlines(run.results),
        rows=score_rows(run.results),
        problems=problems(run.results),
        difference=difference_row(run.results),
        curves=curve_figures(run.arms),
        distances=distance_figures(points),
        levels=LEVELS,
        shown=shown,
        cards=cards,
        kinds={kind: sum(card.candidate.kind == kind for item in shown for card in item.cards.values())
               for kind in ("fork", "alarm", "unknown")},
        left_out=len(points) - cards,
        farthest=max([1.0] + [point.distance for point in points if point.distance is not None]),
        arms=run.arms,
        options=option_rows(run.arms),
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def lede(run: Run) -> str:
    """What was run, in a sentence or two."""
    parts = []
    if run.arms:
        methods = [arm.method for arm in run.arms]
        steps = sorted({arm.steps for arm in run.arms})
        span = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        names = " and ".join(NAMES.get(method, method) for method in dict.fromkeys(methods))
        parts.append(f"{names}, {span} {'step' if steps[-1] == 1 else 'steps'}{' each' if len(run.arms) > 1 else ''}.")
    audited = sum(arm.audited for arm in run.arms)
    kinds = [point.kind for arm in run.arms for point in arm.points]
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
