"""The ladder's build, tiny: files, models, what it says; and once, slowly, with the real reasoning-gym."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_gym import gym

import ladder.__main__ as command
from ladder.levels import LEVELS, Level, Recipe
from ladder.tasks import WRITERS
from topd.evaluation.benchmarks import load_benchmark
from topd.study.config import read_plan

__all__ = ["gym"]  # a fixture
NOTHING = Recipe(width=32, layers=1, problems=64, epochs=1, batch=32, learning_rate=1e-3)
STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Level:
    """A level that takes seconds."""
    level = replace(LEVELS["large"], teacher=NOTHING, student=NOTHING, prompts=40, held_out=20, tuning=10)
    monkeypatch.setitem(command.LEVELS, "small", level)
    return level


def check(out: Path) -> None:
    """What `topd study` takes is there, and nothing is in two files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
            for name in ("prompts", "held_out", "tuning")}  # fmt: skip
    assert {name: len(some) for name, some in rows.items()} == {"prompts": 40, "held_out": 20, "tuning": 10}
    assert len({row["prompt"] for some in rows.values() for row in some}) == 70
    assert len(load_benchmark(str(out / "held_out.jsonl"), rule="integer").problems) == 20
    for name in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        model = AutoModelForCausalLM.from_pretrained(out / name)
        record = json.loads((out / name / "build.json").read_text())
        assert record["parameters"] == model.num_parameters()
        assert {"all"} < set(record["accuracy"]) <= {"all", *WRITERS}
        for row in rows["prompts"]:
            ids = tokenizer(row["prompt"])["input_ids"]
            assert tokenizer.decode(ids) == row["prompt"]
            assert [tokenizer.decode(token).strip() for token in ids].count("boxed") == 1
        assert len(tokenizer("4096")["input_ids"]) == 4  # a digit is a token


def test_the_command_makes_what_a_study_needs(
    gym: None, tiny: Level, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path)]) == 0
    check(tmp_path)
    said = capsys.readouterr().out
    assert "student: 0.0 M parameters, 64 solutions of" in said
    assert "teacher: chain_sum" in said
    assert said.endswith(f"{tmp_path} is ready: topd study --config studies/ladder-small.yaml\n")


def test_what_is_not_made_yet_is_told(
    gym: None, tiny: Level, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path), "--only", "data"]) == 0
    assert capsys.readouterr().out == f"Not there yet in {tmp_path}: teacher, student.\n"


def test_labels_are_the_solution_and_its_end(gym: None, tiny: Level) -> None:
    from ladder.build import EOS, build_tokenizer, rows
    from ladder.tasks import TEACHER, draw

    tokenizer = build_tokenizer(tiny)
    [problem] = draw(tiny.tasks, 1, seed=0, held_out=False)
    [row] = rows(tokenizer, [problem], TEACHER, seed=0)
    labelled = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(row["input_ids"][: -len(labelled)]) == problem.prompt
    assert tokenizer.decode(labelled).endswith(f"\\boxed{{{problem.answer}}}.{EOS}")
    assert row["input_ids"][-len(labelled) :] == labelled


def test_training_lowers_the_loss(gym: None, tiny: Level, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ladder.build import build_tokenizer, train

    longer = replace(tiny, tasks={"gcd": {}}, student=replace(NOTHING, problems=960, epochs=8, learning_rate=5e-3))
    train("student", longer, build_tokenizer(longer), tmp_path)
    losses = [
        float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "loss" in line
    ]
    assert len(losses) == 2
    assert losses[1] < 0.8 * losses[0]


def test_without_reasoning_gym_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    assert command.main([]) == 2
    assert ".[ladder]" in capsys.readouterr().err


@pytest.mark.parametrize("level", LEVELS)
def test_the_study_of_a_level_asks_what_the_level_makes(level: str) -> None:
    plan = read_plan(STUDIES / f"ladder-{level}.yaml")
    folder = f"runs/ladder/{level}"
    assert (plan.student, plan.teacher) == (f"{folder}/student", f"{folder}/teacher")
    assert (plan.data, plan.benchmark) == (f"{folder}/prompts.jsonl", f"{folder}/held_out.jsonl")
    assert plan.rule == "integer"
    assert plan.held_out <= LEVELS[level].held_out
    assert plan.tune_problems <= LEVELS[level].tuning


@pytest.mark.parametrize("level", LEVELS)
def test_a_study_runs_on_what_was_made(gym: None, tiny: Level, tmp_path: Path, level: str) -> None:
    from topd.study.command import run_study

    assert command.main(["--out", str(tmp_path)]) == 0
    plan = read_plan(STUDIES / f"ladder-{level}.yaml")
    files = {
        name: str(tmp_path / Path(getattr(plan, name)).name) for name in ("student", "teacher", "data", "benchmark")
    }
    short = {"max_completion_length": 16, "per_device_train_batch_size": 4, "window_length": 4}
    result = run_study(
        replace(
            plan, **files, tune_benchmark=None, seeds=(0,), steps=1, held_out=6, curve_problems=3,
            sampling=plan.sampling | {"max_new_tokens": 16}, options=plan.options | short,
            arms=tuple(replace(arm, choices=()) for arm in plan.arms[:2]),
        ),
        tmp_path / "study",
    )  # fmt: skip
    assert set(result["arms"]) == {"opd", "topd"}
    assert all(len(arm["right"]["0"]["greedy"]) == 6 for arm in result["arms"].values())


@pytest.mark.slow
def test_the_same_with_the_real_problems(tiny: Level, tmp_path: Path) -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="pip install -e '.[ladder]'")
    import random

    from ladder.tasks import STUDENT, TEACHER, draw, write_solution
    from topd.evaluation.answers import verdict

    assert command.main(["--out", str(tmp_path)]) == 0
    check(tmp_path)
    rng = random.Random(0)
    for level in LEVELS.values():
        for problem in draw(level.tasks, 1200, seed=7, held_out=False):
            for style in (TEACHER, STUDENT):
                text = write_solution(problem, style, rng)
                said = verdict(text, problem.answer, "integer")
                scored = reasoning_gym.get_score_answer_fn(problem.task)(
                    said.extracted, {"answer": problem.answer, "metadata": problem.metadata}
                )
                assert said.right
                assert scored == 1.0, (problem, text)
