"""A study on the page: differences, curves, seconds, and what tuning tried."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_records import HOSTILE, write_study
from read_page import Page, assert_harmless, page_of

import topd
from topd.report import ReportError
from topd.report.study import edges


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return page_of(write_study(tmp_path / "study", ["topd", HOSTILE[0]]))


def test_a_study_is_shown_arm_by_arm(page: Page) -> None:
    assert_harmless(page)
    for expected in (
        "3 arms, each with the same seeds, prompts and 30 optimizer steps", "50.0 (47.0 to 53.0)",
        "−2.0 (−5.0 to +0.0)", "0.02 0.04 1 of 2", "2 seeds", HOSTILE[0],
        "topd 30 30.5 1.49 × learning_rate 0.0003, guidance_weight 0.1 learning_rate: highest",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_how_it_was_sampled_is_told(page: Page, tmp_path: Path) -> None:
    assert "Sampled, temperature 1:" in page.text
    for sampling, told in (({"temperature": 0.6}, "Sampled, temperature 0.6:"), ({}, "Sampled:")):
        plan = {"steps": 30, "held_out": 500, "data": "mine.jsonl", "sampling": sampling}
        assert told in page_of(write_study(tmp_path, [], plan=plan)).text


def test_its_figures_are_a_forest_and_curves_by_steps_tokens_and_seconds(page: Page) -> None:
    labels = [figure["aria-label"] or "" for figure in page.all("svg", "figure")]
    assert [label.split(":")[0] for label in labels] == [
        "Difference from OPD in points", "Accuracy by optimizer steps", "Accuracy by tokens read and generated",
        "Accuracy by seconds of training",
    ]  # fmt: skip
    assert "topd, greedy −2.0; topd, sampled −2.0" in labels[0]
    assert "opd 0.31 to 0.51; topd 0.31 to 0.49" in labels[1]
    shown = [text for tag, text in page.texts if tag == "text"]
    assert shown.count("topd") == 4  # a row of the forest and a panel of each curve; OPD is in every panel
    assert any(text.endswith("0k") for text in shown)


def test_every_setting_that_was_tried_is_shown(page: Page) -> None:
    assert page.text.count("learning_rate 0.0001, guidance_weight 0.1 40.0") == 3
    assert page.text.count("learning_rate 0.0003, guidance_weight 0.1 (chosen) 50.0") == 3


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"a": 1, "b": 0.5, "c": 7, "d": "x"}, "a: lowest, b: highest"),
        ({"a": 2, "b": 0.3, "c": 7, "d": "y"}, ""),
        ({"a": 3}, "a: highest"),
        ({}, ""),
    ],
)
def test_a_choice_at_the_edge_is_named(chosen: dict[str, Any], said: str) -> None:
    choices = [{"a": a, "b": b, "c": 7, "d": "x"} for a in (1, 2, 3) for b in (0.1, 0.3, 0.5)]
    assert edges(chosen, choices) == said


def test_an_older_study_is_shown_without_what_it_lacks(tmp_path: Path) -> None:
    """Version 1: answers as lists, no tuning scores; and no arm but OPD yet."""
    page = page_of(write_study(tmp_path, [], version=1, tuning={}, tuned={"opd": {"learning_rate": 0.1}}))
    assert_harmless(page)
    assert "learning_rate 0.1" in page.text
    assert "All settings that tuning tried" not in page.text
    assert len(page.all("svg", "figure")) == 3


@pytest.mark.parametrize(
    "found", [{"arms": {"opd": 3}}, {"arms": {"opd": {"curve": {"0": [{"step": 1}]}, "greedy": []}}}, {"plan": 1}]
)
def test_a_study_without_most_keys(tmp_path: Path, found: dict[str, Any]) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"version": 2} | found))
    assert_harmless(page_of(tmp_path))


def test_a_newer_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"study\.json has record version 3; this version of topd reads version 2"):
        page_of(write_study(tmp_path, ["topd"], version=3))


def test_the_version_of_a_study_is_written_in_one_place() -> None:
    """Whoever writes `study.json` and whoever reads it say the same."""
    files = Path(topd.__file__).parent.rglob("*.py")
    assert [file.name for file in files if re.search(r"(?m)^(STUDY_)?VERSION = ", file.read_text())] == ["version.py"]
