"""A study on the page."""

from __future__ import annotations

import json
from pathlib import Path

from made_records import HOSTILE
from read_page import assert_harmless, page_of


def test_a_study_is_shown_with_its_curves(tmp_path: Path) -> None:
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    beside = {"mean": -0.02, "low": -0.05, "high": 0.01, "p": 0.02, "p_holm": 0.04, "seeds": [0, 1], "ahead": 1}
    curve = {seed: [{"step": 0, "tokens": 0, "seconds": 0, "accuracy": 0.3}, {"step": 5, "tokens": 90, "seconds": 7.0,
             "accuracy": 0.5 + 0.1 * int(seed)}] for seed in "01"}  # fmt: skip
    arm = {"greedy": {"seeds": [0, 1], "accuracy": interval}, "sampled": {}, "curve": curve}
    arms = {"opd": arm, HOSTILE[0]: arm | {"greedy": {"accuracy": interval, "beside_opd": beside}}}
    plan = {"student": "small", "teacher": "big", "steps": 5, "held_out": 1000}
    (tmp_path / "study.json").write_text(
        json.dumps({"version": 1, "plan": plan, "tuned": {"opd": {"learning_rate": 0.1}}, "arms": arms})
    )
    page = page_of(tmp_path)
    assert_harmless(page)
    for expected in ("50.0 (40.0 to 60.0)", "−2.0 (−5.0 to +1.0)", "0.04", "1 of 2", "2 seeds", "learning_rate 0.1"):
        assert expected in page.text, expected
    labels = [figure["aria-label"] or "" for figure in page.all("svg", "figure")]
    assert len(labels) == 3
    assert "opd 0.3 to 0.55" in labels[0]
