"""Write the pictures of the README from the records of a run.

    make demo-lm
    python docs/pictures.py runs/lm/topd --compare runs/lm/opd runs/lm/eval             # the fork of median distance
    python docs/pictures.py runs/lm/topd --compare runs/lm/opd runs/lm/eval --fork 10   # the tenth largest

Writes `docs/img/fork-light.svg` and `docs/img/fork-dark.svg`: an audited fork, both continuations and the transport
plan between them. Writes `docs/img/report.png`: the top of the run's report in Chromium, where playwright and a
Chromium are installed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from topd.errors import TOPDError
from topd.report import ReportError, write_report
from topd.report.records import load_run
from topd.report.rollouts import Card, align, choose_rollouts, visible

IMAGES = Path(__file__).parent / "img"
PALETTES = {
    "light": {"ink": "#1f2328", "muted": "#59636e", "line": "#8c959f", "accent": "#0969da", "fill": "#ddf4ff"},
    "dark": {"ink": "#f0f6fc", "muted": "#9198a1", "line": "#6e7681", "accent": "#4493f8", "fill": "#12243d"},
}
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
LETTER, PAD, GAP = 7.4, 3.2, 1.6
"""Widths in pixels: of a letter, beside a token's text, between tokens."""
PREFIX_LETTERS, LEFT = 26, 236
"""Letters of the prefix that are shown, and where the windows begin."""
STUDENT, TEACHER, BOX, HEIGHT = 58, 196, 24, 262
"""Middles of the two rows, height of a token, height of the picture."""
WIDTH, TOP = 1200, 690
"""The part of the report in `report.png`, in CSS pixels."""


def forks(folder: Path) -> list[Card]:
    """The audited forks of a run that have both windows and a plan, largest distance first.

    Raises:
        ReportError: there are none.
    """
    shown = choose_rollouts(load_run(folder).arms, sys.maxsize)
    cards = [card for item in shown for card in item.cards.values() if card.candidate.kind == "fork"]
    cards = [card for card in cards if card.candidate.plan and card.alignment]
    if not cards:
        raise ReportError(
            f"{folder} has no audited fork with a transport plan. Train with method: topd and audit_steps."
        )
    return sorted(cards, key=lambda card: card.rank)


def draw(card: Card, colours: dict[str, str]) -> str:
    """A fork as an SVG document: the prefix, the student's window above, the teacher's below, the plan between."""
    candidate = card.candidate
    links = align(candidate)
    assert links is not None
    rows = [_boxes(candidate.student_window), _boxes(candidate.teacher_window)]
    width = max(row[-1][1] for row in rows) + 4
    alt = (
        f"A fork at D_OT {candidate.distance:.3f}. Prefix: {card.before} Student: {''.join(candidate.student_window)} "
    )
    alt += f"Teacher: {''.join(candidate.teacher_window)}"
    root = ElementTree.Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:.0f} {HEIGHT}", "role": "img"}
    )
    root.set("font-family", FONT)
    root.set("font-size", "12.3")
    ElementTree.SubElement(root, "title").text = alt.replace("\n", "↵")
    middle = (STUDENT + TEACHER) / 2
    _text(root, LEFT - 34, middle + 4, f"… {_end(card.before)}", colours["ink"], "end")
    for row in (STUDENT, TEACHER):
        path = f"M{LEFT - 28} {middle}C{LEFT - 8} {middle} {LEFT - 22} {row} {LEFT - 2} {row}"
        ElementTree.SubElement(
            root, "path", {"d": path, "fill": "none", "stroke": colours["ink"], "stroke-width": "1.4"}
        )
    same = {i: j for i, j in links.best.items() if candidate.student_window[i] == candidate.teacher_window[j]}
    for i, j, share in links.links:
        x, y = (sum(rows[side][at]) / 2 for side, at in ((0, i), (1, j)))
        top, bottom = STUDENT + BOX / 2, TEACHER - BOX / 2
        equal = candidate.student_window[i] == candidate.teacher_window[j]
        line = {"d": f"M{x:.1f} {top}C{x:.1f} {middle} {y:.1f} {middle} {y:.1f} {bottom}", "fill": "none"}
        line |= {"stroke": colours["line"], "stroke-dasharray": "1.5 3"} if equal else {"stroke": colours["accent"]}
        ElementTree.SubElement(root, "path", line | {"stroke-width": f"{0.6 + 0.8 * share:.1f}"})
    sides = (
        (STUDENT, rows[0], candidate.student_window, set(same)),
        (TEACHER, rows[1], candidate.teacher_window, set(same.values())),
    )
    for row, boxes, window, matched in sides:
        for place, ((left, right), token) in enumerate(zip(boxes, window, strict=True)):
            _token(root, left, right, row, _shown(token), place in matched, colours)
    note = f"{links.same} of {len(candidate.student_window)} tokens are matched to the same token (dotted)"
    _text(root, LEFT, STUDENT - 24, "student continues", colours["muted"])
    _text(root, LEFT, TEACHER + 30, "teacher continues", colours["muted"])
    _text(root, 4, 16, f"fork, transport distance {candidate.distance:.3f}", colours["accent"])
    _text(root, 4, HEIGHT - 8, note, colours["muted"])
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _shown(token: str) -> str:
    """A token without the spaces around it, which its box shows."""
    return visible(token).strip() or visible(token)


def _end(prefix: str) -> str:
    """The last words of a prefix."""
    end = prefix.replace("\n", "↵")[-PREFIX_LETTERS:]
    return end if len(end) < PREFIX_LETTERS else end.partition(" ")[2] or end


def _boxes(window: Sequence[str]) -> list[tuple[float, float]]:
    """Left and right of each token."""
    found, left = [], float(LEFT)
    for token in window:
        right = left + 2 * PAD + LETTER * max(1, len(_shown(token)))
        found.append((left, right))
        left = right + GAP
    return found


def _token(
    root: ElementTree.Element, left: float, right: float, row: float, text: str, same: bool, colours: dict[str, str]
) -> None:
    box = {
        "x": f"{left:.1f}",
        "y": f"{row - BOX / 2:.1f}",
        "width": f"{right - left:.1f}",
        "height": f"{BOX}",
        "rx": "4",
    }
    style = (
        {"fill": "none", "stroke": colours["line"]} if same else {"fill": colours["fill"], "stroke": colours["accent"]}
    )
    ElementTree.SubElement(root, "rect", box | style | {"stroke-width": "0.9"})
    _text(root, (left + right) / 2, row + 4, text, colours["muted" if same else "ink"], "middle")


def _text(root: ElementTree.Element, x: float, y: float, text: str, colour: str, anchor: str = "start") -> None:
    element = ElementTree.SubElement(
        root, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "fill": colour, "text-anchor": anchor, "xml:space": "preserve"}
    )
    element.text = text


def photograph(run: Path, compare: Sequence[Path], out: Path) -> bool:
    """The top of the report as a picture; False where there is no playwright or no Chromium."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        return False
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = write_report(run, Path(folder) / "report.html", compare)
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error:
            return False
        page = browser.new_page(viewport={"width": WIDTH, "height": TOP}, device_scale_factor=1.5)
        page.goto(page_file.as_uri())
        page.screenshot(path=out)
        browser.close()
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of topd demo or of a training with audit_steps")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], help="more folders for the report, as topd report"
    )
    parser.add_argument("--fork", type=int, help="which fork, 1 = largest distance (default: the median)")
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    try:
        found = forks(options.run)
    except TOPDError as error:
        print(error, file=sys.stderr)
        return 2
    number = (len(found) + 1) // 2 if options.fork is None else options.fork
    if not 1 <= number <= len(found):
        print(f"There is no fork {number}: they are numbered 1 to {len(found)}.", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name, colours in PALETTES.items():
        (options.out / f"fork-{name}.svg").write_text(draw(found[number - 1], colours), encoding="utf-8")
    card = found[number - 1]
    print(f"Fork {number} of {len(found)}: {card.rollout.heading}, D_OT {card.candidate.distance:.3f}")
    if not photograph(options.run, options.compare, options.out / "report.png"):
        print("No report.png: it needs playwright and a Chromium.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
