"""The studies that ship, and what a plan refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import plan

from topd.cli.main import main
from topd.study.config import plan_of, read_plan
from topd.study.run import job_of

STUDIES = Path(__file__).parents[2] / "studies"


def test_the_study_that_ships_is_whole():
    """Six seeds, three tuning seeds, one grid for all arms, and every arm that the claims need."""
    found = read_plan(STUDIES / "embedded.yaml")
    assert {arm.name for arm in found.arms} == {
        "opd", "opd, 1.41 x the steps", "topd", "topd, candidate windows", "topd, regenerated windows",
        "topd, soft targets", "own tokens", "random places", "low-D_OT capped", "high-D_OT capped", "random capped",
    }  # fmt: skip
    assert (len(found.seeds), len(found.tune_seeds), found.grid["guidance_weight"]) == (6, 3, [0.01, 0.03, 0.1, 0.3])


GRID = {"learning_rate": [0.1, 0.2], "guidance_weight": [0.3, 0.4]}


def test_arms_choose_from_one_grid_whose_lambda_of_0_is_opd():
    found = plan(grid=GRID, arms={"opd": {"method": "opd"}, "topd": {"method": "topd"}})
    opd, topd = found.arms
    assert opd.choices == ({"learning_rate": 0.1}, {"learning_rate": 0.2})
    assert len(topd.choices) == 4
    assert topd.choices[1] == {"learning_rate": 0.1, "guidance_weight": 0.4}


def test_an_arm_may_take_what_another_one_was_tuned_to_and_other_steps():
    arms = {"opd": {"method": "opd"}, "long": {"method": "opd", "tuned_as": "opd", "steps_factor": 1.5}}
    found = plan(grid=GRID, arms=arms)
    assert (found.arms[1].tuned_as, found.arms[1].choices) == ("opd", ())
    assert job_of(found, found.arms[1], 0, {}, Path("x")).steps == 6  # of 4


def test_the_study_of_a_real_pair_is_whole():
    found = read_plan(STUDIES / "real-pair.yaml")
    assert (found.benchmark, found.sampling["max_new_tokens"]) == ("math500", 2048)


def test_the_study_of_the_language_model_pair_is_whole():
    found = read_plan(STUDIES / "lm.yaml")
    assert (found.benchmark, found.rule, len(found.seeds), found.lora["r"]) == ("lm-held-out", "gsm8k", 5, 16)
    assert {arm.name: arm.options for arm in found.arms[-2:]} == {
        "opd, random 40 %": {"method": "opd", "token_share": 0.4},
        "teacher's contexts": {"method": "topd", "guidance_context": "teacher"},
    }


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"arms": {"topd": {}}}, "no arm 'opd'"),
        ({"arms": {"opd": {"learning_rat": 1}}}, "learning_rat is not an option"),
        ({"arms": {"opd": {}, "b": {"choices": [{}]}}}, "different numbers of choices"),
        ({"arms": {"opd": {}, "b": {"time_of": "c"}}}, "must name another arm without"),
        ({"arms": {"opd": {}, "b": {"time_of": "c"}, "c": {"time_of": "opd"}}}, "must name another arm without"),
        ({"arms": {"opd": {"time_of": "b"}, "b": {}}}, "the reference cannot have time_of"),
        ({"arms": {"opd": {}, "b": {"time_of": "opd", "choices": [{}]}}}, ": no choices"),
        ({"arms": {"opd": {}, "b": {"tuned_as": "c"}}}, "tuned_as must name an arm that is tuned"),
        ({"arms": {"opd": {}, "b": {"tuned_as": "opd", "choices": [{}]}}}, "tuned_as must name an arm that is tuned"),
        ({"arms": {"opd": {"steps_factor": 0}}}, "steps_factor must be a positive number"),
        ({"arms": {"opd": {"steps_factor": float("nan")}}}, "steps_factor must be a positive number"),
        ({"arms": {"opd": {"max_steps": 7}}}, "arm opd: the study itself sets max_steps, from its"),
        ({"options": {"output_dir": "x", "seed": 1}}, "options: the study itself sets output_dir, seed, from its"),
        ({"level": "middle"}, "level must be short or long"),
        ({"arms": {"opd": {}, "topd+": {}, "topd-": {}}}, "topd\\+ and topd- would write to the same folder"),
        ({"grid": {"learning_rate": 0.1}}, "grid must map options to lists"),
        ({"options": None}, "options must be"),
        ({"data": "p.jsonl", "benchmark": "b", "sampling": 0.6}, "sampling must be"),
        ({"arms": {"opd": {"choices": [3]}}}, "list of option mappings"),
        ({"arms": {"opd": [1]}}, "not a mapping"),
        ({"steps": 0}, "steps must be"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": 3}, "different whole numbers"),
        ({"optons": {}}, "unknown: optons"),
        ({"benchmark": "math500"}, "needs `data`"),
        ({"data": "p.jsonl"}, "needs `benchmark`"),
        ({"data": "p.jsonl", "benchmark": "b", "arms": {"opd": {"choices": [{}]}}}, "`tune_benchmark` must name"),
        ({"data": "p.jsonl", "benchmark": "b", "rule": "maths"}, "rule must be"),
        ({"data": "p.jsonl", "benchmark": "b", "sampling": {"temp": 1}}, "'temp' is unknown"),
        ({"arms": {"opd": {"teacher_model_server_url": "http://kim:word@h"}}}, r"leave .* out .*\(http://\*\*\*@h\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, says):
    with pytest.raises(ValueError, match=says):
        plan(**other)


@pytest.mark.parametrize("text", ["arms: [", "- 1", "", "seeds: [0]\nseeds: [1]\n", "a: !!bool maybe"])
def test_a_broken_file_ends_in_a_message(tmp_path, capsys, text):
    (tmp_path / "s.yaml").write_text(text)
    assert main(["study", "--config", str(tmp_path / "s.yaml")]) == 2
    assert "s.yaml" in capsys.readouterr().err


def test_what_a_study_must_say_is_named():
    with pytest.raises(ValueError, match="missing: seeds, steps, teacher"):
        plan_of({"student": "s", "arms": {"opd": {}}})
