"""The studies that ship, and what a plan refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import plan

from topd.cli import main
from topd.study.config import plan_of, read_plan

STUDIES = Path(__file__).parents[2] / "studies"
CORE = {"opd", "topd", "own tokens", "teacher's contexts, reverse KL", "opd, topd's time"}


def test_the_study_that_ships_is_whole():
    found = read_plan(STUDIES / "embedded.yaml")
    names = {arm.name for arm in found.arms}
    assert names >= CORE | {
        "low-D_OT capped", "high-D_OT capped", "random capped", "topd, rollout windows", "same index",
        "random candidates", "false alarms", "teacher's contexts, cross-entropy",
    }  # fmt: skip
    assert len(found.seeds) >= 10
    assert found.held_out >= 1000


@pytest.mark.parametrize("student", ["stubborn", "wording"])
def test_the_studies_of_other_students_have_the_core_arms(student):
    found = read_plan(STUDIES / f"embedded-{student}.yaml")
    assert found.student == f"embedded:student-{student}"
    assert {arm.name for arm in found.arms} >= CORE
    assert found.held_out >= 1000


def test_the_study_of_a_real_pair_is_whole():
    found = read_plan(STUDIES / "real-pair.yaml")
    assert (found.benchmark, found.sampling["max_new_tokens"]) == ("math500", 2048)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"arms": {"topd": {}}}, "no arm 'opd'"),
        ({"arms": {"opd": {"learning_rat": 1}}}, "learning_rat is no option"),
        ({"arms": {"opd": {}, "b": {"choices": [{}]}}}, "different numbers of choices"),
        ({"arms": {"opd": {}, "b": {"time_of": "c"}}}, "is no other arm"),
        ({"arms": {"opd": {}, "b": {"time_of": "c"}, "c": {"time_of": "opd"}}}, "no other arm with steps of its own"),
        ({"arms": {"opd": {"time_of": "b"}, "b": {}}}, "has no time_of"),
        ({"arms": {"opd": {}, "b": {"time_of": "opd", "choices": [{}]}}}, "leave out choices"),
        ({"options": None}, "options must be"),
        ({"data": "p.jsonl", "benchmark": "b", "sampling": 0.6}, "sampling must be"),
        ({"arms": {"opd": {"choices": [3]}}}, "list of option mappings"),
        ({"arms": {"opd": [1]}}, "not a mapping"),
        ({"steps": 0}, "steps must be"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": 3}, "different whole numbers"),
        ({"optons": {}}, "unknown: optons"),
        ({"benchmark": "math500"}, "goes with `data`"),
        ({"data": "p.jsonl"}, "needs `benchmark`"),
        ({"data": "p.jsonl", "benchmark": "b", "arms": {"opd": {"choices": [{}]}}}, "`tune_benchmark` must name"),
        ({"data": "p.jsonl", "benchmark": "b", "rule": "maths"}, "rule must be"),
        ({"data": "p.jsonl", "benchmark": "b", "sampling": {"temp": 1}}, "'temp' is unknown"),
        ({"arms": {"opd": {"teacher_window_server": "http://kim:word@h"}}}, r"leave .* out .*\(http://\*\*\*@h\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, says):
    with pytest.raises(ValueError, match=says):
        plan(**other)


@pytest.mark.parametrize("text", ["arms: [", "- 1", ""])
def test_a_broken_file_ends_in_a_message(tmp_path, capsys, text):
    (tmp_path / "s.yaml").write_text(text)
    assert main(["study", "--config", str(tmp_path / "s.yaml")]) == 2
    assert "s.yaml" in capsys.readouterr().err


def test_what_a_study_must_say_is_named():
    with pytest.raises(ValueError, match="missing: seeds, steps, teacher"):
        plan_of({"student": "s", "arms": {"opd": {}}})
