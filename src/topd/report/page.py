"""The page: everything a run recorded, in one HTML file that loads nothing."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from topd.evaluation.compare import comparison
from topd.report.case import correct_section
from topd.report.distances import distance_figures
from topd.report.elements import Section, listed, plural, signed
from topd.report.figures import curve_figures
from topd.report.probe import probe_section
from topd.report.records import MAX_CANDIDATES, Arm, Run, load_runs
from topd.report.results import evaluation_section, load_evaluations, results_section
from topd.report.rollouts import LEVELS, Shown, choose_rollouts
from topd.report.study import study_section
from topd.report.summary import counts, evaluation_verdicts, lede, option_rows, provenance_rows, setup, verdicts
from topd.runs.files import write_text

_HERE = Path(__file__).parent


def write_report(run: Path, out: Path | None = None, compare: Sequence[Path] = ()) -> Path:
    """Write the report of a run folder to `out`, by default its `report.html`, and return where it is.

    `compare`: more runs, shown on the same axes. Raises `ReportError` if there is nothing to report, or the records are
    newer than this version of topd.
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
    environment.filters |= {"svg": lambda figure: Markup(figure.svg), "signed": signed, "plural": plural}
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    notes = [note for run in runs for note in run.notes]
    models = load_evaluations([folder for run in runs for folder in run.evaluations], notes)
    compared = comparison({model.label: model.results for model in models}) if models else {}
    sections = _sections(runs)
    if models:
        sections.insert(
            sum(section.title.startswith("Results") for section in sections), evaluation_section(models, compared)
        )
    return environment.get_template("template.html").render(
        title=listed([run.name for run in runs]),
        lede=lede([arm for run in runs for arm in run.arms]),
        verdicts=[text for run in runs for text in verdicts(run)] + evaluation_verdicts(models, compared),
        setup=setup(runs),
        notes=notes,
        sections=sections,
        counts=counts(runs),
        at_first=10,  # candidates, and rollouts, before the reader asks for more
        levels=LEVELS,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **_forks(runs, limit),
    )


def _sections(runs: Sequence[Run]) -> list[Section]:
    """All sections but the forks and rollouts, those of several runs side by side."""
    arms = [arm for run in runs for arm in run.arms]

    def of(run: Run) -> str:
        return f": {run.name}" if len(runs) > 1 else ""

    sections = [results_section(run.results, of(run)) for run in runs]
    sections += [study_section(run.study, i, of(run)) for i, run in enumerate(runs) if run.study]
    sections += [probe_section(run.probe, i, of(run)) for i, run in enumerate(runs) if run.probe]
    sections += [correct_section(run.correct, i, of(run)) for i, run in enumerate(runs) if run.correct]
    points = [point for arm in arms for point in arm.points]
    responses = [
        (f"{arm.name}, {title}" if len(arms) > 1 else title, rows)
        for arm in arms
        for title, rows in [arm.responses]
        if rows
    ]
    options, provenance = option_rows(arms), provenance_rows(arms)
    names = [arm.name for arm in arms]
    first = ", those that differ between the arms first" if len(arms) > 1 else ""
    sections += [
        Section("Training").add("figures", curve_figures(arms)).add("responses", responses),
        Section("Distances").add("figures", distance_figures(points)),
        Section("Provenance").add(
            "by_arm", provenance and ("What", "Models, data, command and versions", names, provenance)
        ),
        Section("Options").add("options", options and (
            f"{len(options)} options{first}", ("Option", "Table of options", names, options)
        )),
    ]  # fmt: skip
    return [section for section in sections if section.blocks]


def _forks(runs: Sequence[Run], limit: int) -> dict[str, object]:
    """What the template needs for candidates and rollouts: those of training, and of the probe."""
    arms = [arm for run in runs for arm in run.arms]
    for run in runs:
        if run.probe:
            name = "probe" if len(runs) == 1 else f"probe of {run.name}"
            arms.append(Arm(name, rollouts=run.probe.rollouts, points=run.probe.points))
    shown: list[Shown] = choose_rollouts(arms, limit)
    cards = sorted((card for item in shown for card in item.cards.values()), key=lambda card: card.rank)
    known = [card.candidate.distance for card in cards if card.candidate.distance is not None]
    return {
        "shown": shown,
        "cards": cards,
        "kinds": Counter(card.candidate.kind for card in cards),
        "sources": Counter(sorted(card.arm for card in cards)),
        "tokens": Counter(card.token for card in cards).most_common(30),  # offered in the filter
        "futures": [card.alignment.data if card.alignment else None for card in cards],
        "left_out": sum(len(arm.points) for arm in arms) - len(cards),
        "farthest": max(known, default=0.0) or 1.0,
    }
