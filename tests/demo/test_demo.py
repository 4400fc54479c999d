"""The embedded task, pair and demo."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd.demo.build import RECIPES
from topd.demo.run import Size, run_demo
from topd.embedded.pair import pair_folder
from topd.embedded.task import (
    TEACHER,
    Problem,
    Style,
    extract_answer,
    is_correct,
    make_problems,
    read_problem,
    sample_problem,
    write_solution,
)
from topd.embedded.tokenizer import build_tokenizer
from topd.errors import TOPDError
from topd.evaluation.embedded import correct_answers

LEVELS = ("short", "long")
TOKENIZERS = {level: build_tokenizer(level) for level in LEVELS}

problems = st.builds(
    lambda seed, level: sample_problem(random.Random(seed), level), st.integers(0, 2**20), st.sampled_from(LEVELS)
)


def test_the_paper_s_example():
    problem = Problem("5+2×3")
    assert problem.prompt == "what is 5+2×3?"
    assert problem.answer == "11"
    left_to_right = Style(TEACHER.weights, left_to_right=1.0)
    assert extract_answer(write_solution(problem, left_to_right, random.Random(0))) == "21"


@given(problems, st.integers(0, 99))
def test_the_teacher_s_way_ends_in_python_s_answer_and_text_survives_the_tokenizer(problem, seed):
    text = write_solution(problem, TEACHER, random.Random(seed))
    expected = str(eval(problem.expression.replace("×", "*")) % 100)
    assert problem.answer == expected
    assert is_correct(text, expected)
    tokenizer = TOKENIZERS[problem.level]
    ids = tokenizer(problem.prompt + text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == problem.prompt + text


@given(problems)
def test_a_problem_is_read_from_its_prompt(problem):
    assert read_problem(problem.prompt) == problem
    for other in (
        "what is 1+1?",
        "what is 1+)2(+3?",
        "what is (1+2+3?",
        "what is 1+2()+3?",
        "what is 12+3×4?",
        "what is 1+2×3",
        "what is 1/2+3?",
        f"{problem.prompt} ",
    ):
        assert read_problem(other) is None


def test_brackets_are_evaluated_first_and_the_habit_ignores_precedence_inside_them():
    problem = Problem("2×(9-4×2)+1-1+1")
    assert problem.answer == "3"
    habit = write_solution(problem, Style(TEACHER.weights, left_to_right=1.0), random.Random(0))
    assert "9-4" in habit
    assert extract_answer(habit) == str(2 * ((9 - 4) * 2) + 1)


def test_the_levels_differ_in_length():
    words = {level: [len(p.expression) for p in make_problems(200, 0, held_out=False, level=level)] for level in LEVELS}
    assert max(words["short"]) < min(words["long"])
    assert {p.level for p in make_problems(200, 0, held_out=False, level="long")} == {"long"}


def test_train_and_held_out_problems_are_disjoint_and_come_from_the_seed():
    train, held_out = (make_problems(500, 3, held_out=part) for part in (False, True))
    assert not {p.expression for p in train} & {p.expression for p in make_problems(500, 4, held_out=True)}
    assert train == make_problems(500, 3, held_out=False)
    assert len({p.expression for p in held_out}) == 500


@pytest.mark.parametrize("text", ["", "so the answer is", "so the answer is 123", "the answer is 11. then", "11"])
def test_a_solution_without_a_conclusion_has_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize("name", RECIPES)
def test_an_embedded_model_loads_is_small_and_is_as_good_as_its_record_says(name):
    folder, recipe = pair_folder(name), RECIPES[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_500_000
    record = json.loads((folder / "build.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    held_out = make_problems(100, seed=0, held_out=True, level=recipe.level)
    share = sum(correct_answers(model, tokenizer, held_out)) / 100
    assert share == pytest.approx(record["greedy_accuracy_held_out_1000"], abs=0.11)


def test_an_unknown_embedded_model_is_named_with_the_known_ones():
    with pytest.raises(TOPDError, match="Known: long-student"):
        pair_folder("student")


def test_a_small_demo_writes_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("topd.demo.run.QUICK", Size(steps=1, held_out=12, sampled=1, probe_rollouts=4, batch=4))
    monkeypatch.setattr("topd.demo.run.CURVE_PROBLEMS", 2)
    results = run_demo(tmp_path, quick=True)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["teacher"]["greedy"] == results["teacher"]["greedy"] > 0.5
    assert [arm["name"] for arm in written["arms"]] == ["opd", "topd"]
    for arm in written["arms"]:
        for how in ("greedy", "sampled"):
            assert 0 <= arm[how]["low"] <= arm[how]["mean"] <= arm[how]["high"] <= 1
            assert arm[how]["n"] == 12
        assert arm["steps"] == 1
        assert (tmp_path / arm["name"] / "model.safetensors").is_file()
        assert (tmp_path / arm["name"] / "trainer_state.json").is_file()
    assert written["overhead"] == pytest.approx(
        written["arms"][1]["seconds_per_step"] / written["arms"][0]["seconds_per_step"]
    )
    assert {"value", "low", "high"} == set(written["false_alarm_share"])
    assert {"seed", "seconds_total", "versions", "student"} <= set(written)
    assert (tmp_path / "topd" / "audit.jsonl").is_file()
    assert "what is" in (tmp_path / "report.html").read_text()
    assert "TOPD - OPD" in capsys.readouterr().out
