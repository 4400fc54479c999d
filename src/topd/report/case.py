"""The case study (Fig. 3 of the paper): one fork, token by token, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch
from rich.console import Console
from rich.text import Text

from topd.report.analyses import Case, load_correct
from topd.report.analysis_sections import Strip, case_text
from topd.report.reading import ReportError
from topd.report.svg import BLUE, INK
from topd.runs.files import replacing

_ROW, _LETTER, _LEFT = 0.34, 0.085, 2.3
"""Inches: height of a strip, width of a letter, where tokens begin."""


def load_case(folder: Path, fork: int | None = None) -> tuple[int, Case]:
    """A fork of a local correction, numbered from 1; by default the typical one.

    Typical: the middle one by how much nearer to the teacher TOPD brings the student than OPD does, among those where
    either changed anything. A fork picked for how well it looks would show nothing.

    Raises:
        ReportError: there is no such fork, or no local correction in the folder.
    """
    correct = load_correct(Path(folder), [])
    if correct is None or not correct.cases:
        raise ReportError(f"{folder} holds no local correction. Run topd correct --out {folder} first.")
    if fork is None:
        fork = typical(correct.cases) + 1
    if not 1 <= fork <= len(correct.cases):
        raise ReportError(f"There is no fork {fork} in {folder}: they are numbered 1 to {len(correct.cases)}.")
    return fork, correct.cases[fork - 1]


def typical(cases: Sequence[Case]) -> int:
    """Index of the middle one, by D_OT after TOPD less D_OT after OPD, of the cases that either changed; else 0."""

    def gain(case: Case) -> float | None:
        distance = {window.name: window.distance for window in case.windows}
        topd, opd = distance.get("topd"), distance.get("opd")
        return None if topd is None or opd is None else topd - opd

    def windows(case: Case) -> set[tuple[str, ...]]:
        return {window.tokens for window in case.windows if window.name in ("before", "opd", "topd")}

    changed = [index for index, case in enumerate(cases) if len(windows(case)) > 1]
    known = sorted((value, index) for index in changed if (value := gain(cases[index])) is not None)
    return known[len(known) // 2][1] if known else 0


def print_case(case: Case, console: Console) -> None:
    """The prefix, then each window; tokens in brackets are not the teacher's."""
    shown = case_text(case)
    console.print(Text(shown.title, style="bold"))
    console.print(Text(f"… {shown.prefix}"))
    widest = max(len(strip.name) for strip in shown.strips)
    for strip in shown.strips:
        line = Text(f"{strip.name:{widest}}  ")
        for token, same in strip.tokens:
            line.append(token if same else f"[{token}]", style="" if same else "bold")
            line.append(" ")
        line.append(strip.note, style="dim")
        console.print(line, soft_wrap=True)


def draw_case(case: Case, path: Path) -> Path:
    """The same as a picture; the ending of `path` says of which kind (svg, png, pdf).

    Raises:
        ReportError: it is of a kind that cannot be drawn.
    """
    shown = case_text(case)
    widths = [[_LETTER * max(2, len(token)) + 0.14 for token, _ in strip.tokens] for strip in shown.strips]
    width = _LEFT + max(sum(row) + 0.06 * len(row) for row in widths) + 0.2
    height = _ROW * (len(shown.strips) + 2) + 0.1
    canvas = Canvas(figsize=(width, height))
    axes = canvas.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(
        0.1, _ROW * 0.6, f"…{shown.prefix[-int(width / _LETTER) + 4 :]}", parse_math=False, va="center", fontsize=9
    )
    for row, (strip, sizes) in enumerate(zip(shown.strips, widths, strict=True)):
        _draw(axes, strip, sizes, _ROW * (row + 1.7))
    kind = path.suffix[1:] or "no ending"
    try:
        with replacing(path) as aside:
            canvas.savefig(aside, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    except ValueError as error:
        raise ReportError(f"{path}: {error}. Give a name that ends in .svg, .png or .pdf.") from error
    return path


def _draw(axes: Axes, strip: Strip, sizes: list[float], at: float) -> None:
    axes.text(0.1, at, strip.name, va="center", fontsize=9, fontweight="bold")
    axes.text(_LEFT - 0.08, at, strip.note.partition(",")[0], va="center", ha="right", fontsize=6.5, color=INK)
    left = _LEFT
    for (token, same), size in zip(strip.tokens, sizes, strict=True):
        face = to_rgba(BLUE, 0.22) if same else "none"
        box = FancyBboxPatch(
            (left, at - 0.11), size, 0.22, boxstyle="round,pad=0,rounding_size=0.04", linewidth=0.8,
            facecolor=face, edgecolor=BLUE if same else INK,
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(
            left + size / 2, at, token, va="center", ha="center", fontsize=8, family="monospace", parse_math=False
        )
        left += size + 0.06
