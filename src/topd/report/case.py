"""What `topd correct` left behind: its section, and the case study (Fig. 3 of the paper) as text and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch
from rich.console import Console
from rich.text import Text

from topd.paper import LOCAL_CORRECTION
from topd.report.distances import correct_figure
from topd.report.elements import Group, Section, Table, decimals, interval_of, numbers, p_value
from topd.report.reading import ReportError, clean, mapping, number, read_lines, read_object, strings
from topd.report.rollouts import visible
from topd.report.svg import BLUE, INK
from topd.runs.files import replacing

MEASURES = {
    "distance": "D_OT to the teacher's window",
    "teacher_log_likelihood": "Teacher's log-likelihood of the window, nats/token",
    "agreement": "Share of tokens equal to the teacher's",
    "right": "Share of continuations with the right answer",
}
MOST_CASES = 40
_ROW, _LETTER, _LEFT = 0.34, 0.085, 2.3
"""Inches: height of a strip, width of a letter, where tokens begin."""


@dataclass(frozen=True)
class Window:
    """The student's window at one time: tokens, D_OT to the teacher's, whether the continuation ends right."""

    name: str
    tokens: tuple[str, ...]
    distance: float | None
    right: bool | None

    @property
    def note(self) -> str:
        distance = "" if self.distance is None else f"D_OT {self.distance:.3f}"
        return distance + ("" if self.right is None else ", ends right" if self.right else ", ends wrong")


@dataclass(frozen=True)
class Case:
    """One fork that was corrected: the teacher's window, and the student's before and after each arm."""

    rollout: int
    position: int
    prefix: str
    teacher: tuple[str, ...]
    windows: tuple[Window, ...]

    @property
    def title(self) -> str:
        return f"Rollout {self.rollout + 1}, token {self.position + 1}"

    @property
    def strips(self) -> list[tuple[str, str, list[tuple[str, bool]]]]:
        """Name, note and tokens of each window; True: the teacher's window has the token too, in the same order."""
        strips = [("teacher", "", [(visible(token), True) for token in self.teacher])]
        for window in self.windows:
            shared = SequenceMatcher(None, self.teacher, window.tokens, autojunk=False).get_matching_blocks()
            same = {place for block in shared for place in range(block.b, block.b + block.size)}
            tokens = [(visible(token), place in same) for place, token in enumerate(window.tokens)]
            strips.append((window.name, window.note, tokens))
        return strips


@dataclass
class CorrectRecords:
    result: Mapping[str, Any]
    cases: list[Case]


def load_correct(folder: Path, notes: list[str]) -> CorrectRecords | None:
    """The local correction in a folder or in its subfolder `correct`; None if there is none."""
    folder = folder if (folder / "correct.json").is_file() else folder / "correct"
    result = read_object(folder / "correct.json", notes)
    if not result:
        return None
    return CorrectRecords(
        result, list(read_lines(folder / "correct_records.jsonl", "correct_records.jsonl", notes, _case))
    )


def _case(record: Mapping[str, Any]) -> Case:
    outcomes = {"before": mapping(record.get("before"))} | {
        str(arm): mapping(outcome) for arm, outcome in mapping(record.get("after")).items()
    }
    prefix = clean(record.get("prefix") or "")
    return Case(
        rollout=int(record.get("rollout") or 0),
        position=int(record.get("position") or 0),
        prefix=prefix if len(prefix) <= 240 else f"…{prefix[-240:]}",
        teacher=strings(record.get("teacher_window")),
        windows=tuple(
            Window(clean(name), strings(outcome.get("window")), number(outcome.get("distance")), outcome.get("right"))
            for name, outcome in outcomes.items()
        ),
    )


def correct_section(correct: CorrectRecords, index: int = 0, of: str = "") -> Section:
    """`index`: of the run on the page; `of`: its name, where there are several."""
    measures = mapping(correct.result.get("measures"))
    steps = number(mapping(mapping(correct.result.get("run")).get("options")).get("steps"))
    section = Section(
        f"Local correction{of}",
        f"At each of {number(correct.result.get('forks')) or 0:.0f} forks the student takes "
        f"{'' if steps is None else f'{steps:.0f} '}gradient steps on that one window, always from the same weights, "
        "and then continues from the same prefix. TOPD trains on the plan that defines D_OT. No arm trains on the "
        "other measures, so they are better evidence.",
    )
    distances: dict[str, list[float]] = {}
    for window in (window for case in correct.cases for window in case.windows):
        if window.distance is not None:
            distances.setdefault(window.name, []).append(window.distance)
    figure = correct_figure(distances, f"correct-{index}")
    section.add("figures", [figure] if figure else [])
    groups = [
        Group(_rows(mapping(measures[name]), LOCAL_CORRECTION if name == "distance" else {}), words)
        for name, words in MEASURES.items()
        if name in measures
    ]
    head = ("", "Mean", "95 % interval", "Quartiles", "Minus OPD", "p", "Paper")
    caption = "Means over forks with 95 % bootstrap intervals; difference from OPD: paired, p by random sign flips."
    section.add("table", Table("Table of local correction", head, groups, caption, paper=True))
    section.add("cases", correct.cases[:MOST_CASES])
    left_out = len(correct.cases) - MOST_CASES
    more = "1 more case in" if left_out == 1 else f"{left_out:,} more cases in"
    return section.add("note", f"{more} the records." if left_out > 0 else "")


def _rows(measure: Mapping[str, Any], paper: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Arm, mean, interval, quartiles, difference from OPD with p, the paper's mean."""
    compared = mapping(measure.get("beside_opd"))
    rows: list[tuple[str, ...]] = []
    for arm, found in mapping(measure.get("arms")).items():
        row, other = numbers(found), numbers(compared.get(arm))
        quartiles = " · ".join(decimals(row.get(name), 2) for name in ("q1", "median", "q3"))
        difference = f"{other['mean']:+.3f}".replace("-", "−") if "mean" in other else ""
        own = f"{paper[arm]:.3f}" if arm in paper else ""
        mean, p = decimals(row.get("mean")), p_value(other.get("p"))
        rows.append((clean(arm), mean, interval_of(row), quartiles, difference, p, own))
    return rows


def load_case(folder: Path, fork: int | None = None) -> tuple[int, Case]:
    """A fork of a local correction, numbered from 1; by default the `typical` one.

    Raises `ReportError` if there is no such fork, or no local correction in the folder.
    """
    correct = load_correct(Path(folder), [])
    if correct is None or not correct.cases:
        raise ReportError(f"{folder} contains no local correction. Run topd correct --out {folder} first.")
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
    console.print(Text(case.title, style="bold"))
    console.print(Text(f"… {case.prefix}"))
    widest = max(len(name) for name, _, _ in case.strips)
    for name, note, tokens in case.strips:
        line = Text(f"{name:{widest}}  ")
        for token, same in tokens:
            line.append(token if same else f"[{token}]", style="" if same else "bold")
            line.append(" ")
        line.append(note, style="dim")
        console.print(line, soft_wrap=True)


def draw_case(case: Case, path: Path) -> Path:
    """The same as a picture: .svg, .png or .pdf. Raises `ReportError` for a kind that cannot be drawn."""
    strips = case.strips
    widths = [[_LETTER * max(2, len(token)) + 0.14 for token, _ in tokens] for _, _, tokens in strips]
    width = _LEFT + max(sum(row) + 0.06 * len(row) for row in widths) + 0.2
    height = _ROW * (len(strips) + 2) + 0.1
    canvas = Canvas(figsize=(width, height))
    axes = canvas.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    prefix = f"…{case.prefix[-int(width / _LETTER) + 4 :]}"
    axes.text(0.1, _ROW * 0.6, prefix, parse_math=False, va="center", fontsize=9)
    for row, (strip, sizes) in enumerate(zip(strips, widths, strict=True)):
        _draw(axes, *strip, sizes, _ROW * (row + 1.7))
    kind = path.suffix[1:] or "no ending"
    try:
        with replacing(path) as aside:
            canvas.savefig(aside, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    except ValueError as error:
        raise ReportError(f"{path}: {error}. Give a name that ends in .svg, .png or .pdf.") from error
    return path


def _draw(axes: Axes, name: str, note: str, tokens: list[tuple[str, bool]], sizes: list[float], at: float) -> None:
    axes.text(0.1, at, name, va="center", fontsize=9, fontweight="bold")
    axes.text(_LEFT - 0.08, at, note.partition(",")[0], va="center", ha="right", fontsize=6.5, color=INK)
    left = _LEFT
    for (token, same), size in zip(tokens, sizes, strict=True):
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
