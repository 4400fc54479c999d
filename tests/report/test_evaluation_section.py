"""Evaluations on the page: the same figures as `topd eval`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_evaluations import write_evaluation
from made_records import HOSTILE, record, write_arm
from read_page import Page, assert_harmless, page_of

from topd.errors import TOPDError
from topd.evaluation.compare import compare
from topd.evaluation.results import read_results, summary
from topd.report import ReportError, write_report


def write_evaluations(folder: Path) -> Path:
    """Three models on two competitions of 30 and a set of ours."""
    rng = np.random.default_rng(0)
    for label, chance in (("warm", 0.4), ("opd", 0.5), ("topd", 0.9)):
        for name in ("aime24", "hmmt25", "mine"):
            write_evaluation(folder / label, name, rng.random((30, 5)) < chance, top_p=0.95)
    return folder


def test_an_evaluation_is_shown_as_table_1_with_its_differences(tmp_path: Path) -> None:
    """The figures are those that `topd eval` writes, and the first model is that of its comparison."""
    folder = write_evaluations(tmp_path / "eval")
    told = compare([folder / label for label in ("warm", "opd", "topd")], folder)
    page = page_of(folder)
    assert_harmless(page)
    assert "3 models on 3 benchmarks, 5 samples per problem (temperature 0.6, top_p 0.95)." in page.text
    mean = told["models"]["topd"]["mean"]
    row = told["comparisons"][-1]
    assert (row["model"], row["column"]) == ("topd", "mean")
    for expected in (
        "aime24 hmmt25 mine mean", f"{100 * mean['mean']:.1f} {100 * mean['low']:.1f}–{100 * mean['high']:.1f}",
        "+ TOPD 63.3 40.0 – 52.2", "Points minus warm", f"mean {100 * row['mean']:+.1f} +",
        f"{100 * row['power']['detectable']:.1f} {row['power']['problems']} ", "30 × 5",
        f"{100 * summary(read_results(folder / 'opd')['mine'])['majority']['mean']:.1f} (",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "46.7 40.0" not in page.text  # aime25 was not asked
    (label,) = [figure["aria-label"] or "" for figure in page.all("svg", "figure")]
    assert label.startswith("Points minus warm: opd, aime24 ")
    assert f"topd, mean {100 * row['mean']:+.1f}." in label


def test_an_evaluation_stands_beside_a_run_and_one_alone_compares_nothing(tmp_path: Path) -> None:
    run = write_arm(tmp_path / "topd", [record()])
    folder = write_evaluation(tmp_path / HOSTILE[0].replace("/", ""), HOSTILE[5], np.eye(6))
    page = Page(write_report(run, compare=[folder]))
    assert_harmless(page)
    assert f"1 model on {HOSTILE[5]}, 6 samples per problem" in page.text
    assert "Points minus" not in page.text
    assert "The paper’s Table 1" not in page.text
    assert len(page.all("article")) == 1


def test_evaluations_that_cannot_be_read_or_compared(tmp_path: Path) -> None:
    folder = write_evaluations(tmp_path / "eval")
    (folder / "opd" / "mine.samples.jsonl").write_text('{"problem": "0000", "sample": 0}\n')
    (folder / "topd" / "mine.settings.json").write_text("[")
    page = page_of(folder)
    assert "not every problem of mine has a sample yet" in page.text
    assert "mine.settings.json cannot be read" in page.text
    assert "1 model on 3 benchmarks" in page.text
    write_evaluation(folder / "opd", "mine", np.ones((31, 1)))
    with pytest.raises(TOPDError, match="answered different problems or prompts under the name mine"):
        page_of(folder)
    write_evaluation(folder / "opd", "mine", np.ones((30, 1)), version=9)
    with pytest.raises(ReportError, match=r"mine\.settings\.json has record version 9"):
        page_of(folder)


def test_solutions_of_a_teacher_are_no_evaluation(tmp_path: Path) -> None:
    """`topd generate` leaves a settings file too."""
    write_evaluation(tmp_path / "eval" / "a", "mine", np.ones((6, 1)))
    (tmp_path / "eval" / "solutions.settings.json").write_text("{}")
    assert "1 model on mine" in page_of(tmp_path / "eval").text
