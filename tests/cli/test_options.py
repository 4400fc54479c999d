"""Options that the commands share: one spelling on all of them, JSON objects, YAML files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from topd.cli import check, correct, names, probe, train, warmstart
from topd.cli.data_options import source_of
from topd.cli.main import main, parser
from topd.cli.options import json_object, option_names
from topd.errors import TOPDError
from topd.study.config import plan_of

RECIPE = """
model_name_or_path: my-student
teacher_model_name_or_path: my-teacher
data: my.jsonl
output_dir: runs/x
bf16: false
temperature: 0.7
max_completion_length: 77
window_length: 9
candidate_share: 0.05
embedding: teacher
ground_cost: sqeuclidean
seed: 5
chat_template_kwargs: {enable_thinking: false}
candidate_ranking: teacher_nll
guidance_weight: 0.5
"""


def parsed(tmp_path: Path, *words: str, command: str = "probe", more: str = "") -> argparse.Namespace:
    file = tmp_path / "run.yaml"
    file.write_text(RECIPE + more)
    top = argparse.ArgumentParser("topd")
    commands = top.add_subparsers()
    probe.add_options(commands.add_parser("probe"))
    correct.add_options(commands.add_parser("correct"))
    return top.parse_args([command, "--config", str(file), *words])


def test_a_probe_measures_what_the_run_will_train_on(tmp_path: Path) -> None:
    options = parsed(tmp_path)
    found = {name: getattr(options, name) for name in (
        "student", "teacher", "data", "temperature", "max_new_tokens", "window_length", "share", "embedding", "cost",
        "seed", "chat_template_kwargs", "candidate_ranking",
    )}  # fmt: skip
    assert found == {
        "student": "my-student", "teacher": "my-teacher", "data": "my.jsonl", "temperature": 0.7, "max_new_tokens": 77,
        "window_length": [9], "share": 0.05, "embedding": ["teacher"], "cost": ["sqeuclidean"], "seed": 5,
        "chat_template_kwargs": {"enable_thinking": False}, "candidate_ranking": "teacher_nll",
    }  # fmt: skip
    assert parsed(tmp_path, command="correct").guidance_weight == 0.5


def test_what_an_analysis_does_not_use_of_the_file_is_named(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.yaml"
    parsed(tmp_path)
    assert capsys.readouterr().err == ""
    more = "top_p: 0.9\ntop_k: 20\nbeta: 0\nmodel_revision: v2\nteacher_model_revision: v3\n"
    parsed(tmp_path, more=more)
    assert capsys.readouterr().err == (
        f"topd: {file}: topd probe does not use model_revision, teacher_model_revision, top_p, top_k, beta of it; its "
        "figures are those of a run without.\n"
    )
    parsed(tmp_path, command="correct")
    assert "topd correct does not use embedding, ground_cost, candidate_ranking of it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["probe", "correct"])
def test_options_after_the_file_win(tmp_path: Path, command: str) -> None:
    options = parsed(tmp_path, "--temperature", "1", "--chat-template-kwargs", '{"a": 1}', command=command)
    assert (options.temperature, options.chat_template_kwargs, options.student) == (1.0, {"a": 1}, "my-student")


def test_a_file_that_is_not_there_ends_in_a_message(capsys: Any) -> None:
    assert main(["probe", "--config", "gone.yaml"]) == 2
    assert "gone.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1]", "3", "{", "nonsense"])
def test_a_value_that_is_no_json_object_is_rejected(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write a JSON object"):
        json_object(text)
    assert json_object('{"enable_thinking": false}') == {"enable_thinking": False}


def test_a_name_that_a_json_value_has_twice_is_rejected() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'a' appears more than once in an object; remove one"):
        json_object('{"a": true, "a": false}')
    with pytest.raises(ValueError, match=r"'a\.jsonl' appears more than once"):
        source_of(['{"a.jsonl": 1, "a.jsonl": 2}'])


# One spelling on all commands


@pytest.mark.parametrize("student", ["--student", "--model_name_or_path", "--model-name-or-path"])
@pytest.mark.parametrize("teacher", ["--teacher", "--teacher_model_name_or_path", "--teacher-model-name-or-path"])
@pytest.mark.parametrize("command", ["probe", "correct"])
def test_the_analyses_take_either_spelling(command: str, student: str, teacher: str) -> None:
    words = [command, student, "S", f"{teacher}=T", "--window_length", "7", "--max_completion_length", "9"]
    options = parser().parse_args([*words, "--output-dir", "o"])
    assert (options.student, options.teacher, options.window_length, options.max_new_tokens) == ("S", "T", [7], 9)
    assert options.out == Path("o")


@pytest.mark.parametrize("words", [
    ["--student", "S", "--data", "D", "--max_new_tokens", "9"],
    ["--model_name_or_path", "S", "--benchmark", "D", "--max-new-tokens", "9"],
    ["--model", "S", "--data", "D", "--max-completion-length", "9"],
])  # fmt: skip
def test_eval_takes_either_spelling(words: list[str]) -> None:
    options = parser().parse_args(["eval", *words])
    assert (options.model, options.benchmark, options.max_new_tokens) == (["S"], ["D"], 9)


def test_generate_and_study_take_either_spelling() -> None:
    words = [
        "--teacher_model_name_or_path",
        "T",
        "--data",
        "D",
        "--out",
        "o.jsonl",
        "--data_limit",
        "3",
        "--top_p",
        "1",
    ]
    options = parser().parse_args(["generate", *words])
    assert (options.teacher, options.limit, options.top_p) == ("T", 3, 1.0)
    words = ["--config", "x.yaml", "--model_name_or_path", "S", "--teacher-model-name-or-path", "T", "--data", "D"]
    options = parser().parse_args(["study", *words])
    assert (options.student, options.teacher, options.data) == ("S", "T", "D")


CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize("read", [train.parse, check.parsed], ids=["train", "check"])
@pytest.mark.parametrize(("words", "in_file"), [
    (["--student", "S", "--teacher", "T", "--data", "D", "--window-length", "7", "--max-new-tokens", "9"], ""),
    (["--model_name_or_path", "S", "--teacher_model_name_or_path=T", "--data=D", "--window_length", "7",
      "--max_completion_length", "9"], ""),
    ([], "student: S\nteacher: T\ndata: D\nwindow-length: 7\nmax_new_tokens: 9\n"),
    (["--student", "S"], "model_name_or_path: other\nteacher: T\ndata: D\nwindow_length: 7\nmax-new-tokens: 9\n"),
])  # fmt: skip
def test_train_and_check_take_either_spelling(tmp_path: Path, read: Any, words: list[str], in_file: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(in_file)
    data, config, model = read([*(["--config", str(file)] if in_file else []), *words, *CPU, "--out", str(tmp_path)])
    assert (model.model_name_or_path, config.teacher_model_name_or_path, data.data) == ("S", "T", "D")
    assert (config.window_length, config.max_completion_length, config.output_dir) == (7, 9, str(tmp_path))


def test_the_checks_own_options_are_not_the_run_s() -> None:
    own, others = check.check_parser().parse_known_args(["--max_new_tokens", "5", "--max_completion_length", "9"])
    assert own.max_new_tokens == 5
    assert check.parsed([*others, *CPU])[1].max_completion_length == 9


@pytest.mark.parametrize("words", [["--student", "S", "--teacher", "T"], ["--model-name-or-path", "S", "--teacher=T"]])
def test_warmstart_takes_either_spelling(tmp_path: Path, words: list[str]) -> None:
    data, config, model = warmstart.parse([*words, "--data", "D", *CPU, "--output-dir", str(tmp_path)])
    assert (model.model_name_or_path, config.teacher_model_name_or_path, data.data) == ("S", "T", "D")
    file = tmp_path / "warm.yaml"
    file.write_text("student: S\nteacher: T\nkd-ratio: 0.25\n")
    _, config, model = warmstart.parse(["--config", str(file), *CPU, "--out", str(tmp_path)])
    assert (model.model_name_or_path, config.teacher_model_name_or_path, config.kd_ratio) == ("S", "T", 0.25)


def test_a_studys_yaml_takes_either_spelling() -> None:
    common = {"seeds": [1], "steps": 2, "arms": {"opd": {"method": "opd"}, "topd": {"window-length": 7}}}
    plan = plan_of({"model_name_or_path": "S", "teacher_model_name_or_path": "T", "held-out": 5, **common})
    assert (plan.student, plan.teacher, plan.held_out) == ("S", "T", 5)
    assert plan.arms[1].options == {"window_length": 7}
    with pytest.raises(TOPDError, match="student and model_name_or_path are the same option"):
        plan_of({"student": "S", "model_name_or_path": "S2", "teacher": "T", **common})


def test_messages_name_the_option_as_typed(capsys: Any, tmp_path: Path) -> None:
    assert main(["train", "--studnet", "S", *CPU]) == 2
    assert "Unknown option 'studnet'" in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    file.write_text("student: S\nmodel-name-or-path: S\n")
    assert main(["train", "--config", str(file), *CPU]) == 2
    assert "student and model-name-or-path are the same option: keep one." in capsys.readouterr().err
    assert main(["probe", "--max_new_tokens", "0"]) == 2
    assert "--max-new-tokens must be at least 1; got 0" in capsys.readouterr().err
    assert main(["generate", "--teacher", "T", "--data", "embedded", "--out", "o.txt"]) == 2
    assert "--out o.txt" in capsys.readouterr().err


# Names of other tools


@pytest.mark.parametrize(("words", "part", "name", "value"), [
    (["--torch_dtype", "bfloat16"], 2, "dtype", "bfloat16"),
    (["--lr", "0.5"], 1, "learning_rate", 0.5),
    (["--model", "S"], 2, "model_name_or_path", "S"),
    (["--teacher-model", "T"], 1, "teacher_model_name_or_path", "T"),
    (["--teacher_models", '{"a": "A"}'], 1, "teachers", {"a": "A"}),
    (["--warmup_ratio", "0.1"], 1, "warmup_steps", 0.1),
    (["--lora_rank", "3", "--lora"], 2, "lora_r", 3),
])  # fmt: skip
def test_names_of_the_same_meaning_are_accepted(words: list[str], part: int, name: str, value: Any) -> None:
    assert getattr(train.parse([*words, *CPU])[part], name) == value


@pytest.mark.parametrize("parse", [train.parse, warmstart.parse])
def test_lora_without_adapters_is_not_ignored(tmp_path: Path, parse: Any) -> None:
    with pytest.raises(TOPDError, match="lora_r does nothing without use_peft: add --use_peft true"):
        parse(["--lora_rank", "3", *CPU])
    (tmp_path / "own.yaml").write_text("use_peft: true\nlora_alpha: 8\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--use_peft", "false", *CPU]
    assert not parse(words)[2].use_peft  # a file's adapters may be switched off


@pytest.mark.parametrize(("name", "told"), [
    ("logging_dir", "set the environment variable TENSORBOARD_LOGGING_DIR"),
    ("lmbda", "leave it out"),
    ("batch_size", "write --per_device_train_batch_size N"),
    ("overwrite-output-dir", "use another --output_dir"),
    ("torch_dtyp", "Did you mean --dtype"),
    ("nproc_per_node", "write --num_processes N"),
])  # fmt: skip
def test_names_without_an_equal_say_what_to_write(capsys: Any, name: str, told: str) -> None:
    assert main(["train", f"--{name}", "x"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert f"Unknown option '{name}'" in error
    assert len(error.splitlines()) == 1


def test_every_such_name_points_at_an_option_that_exists() -> None:
    known = option_names(train.page().kinds) | option_names(warmstart.page().kinds)
    assert set(names.SAME.values()) <= known
    assert not set(names.SAME) & set(names.INSTEAD)
    named = {name for text in names.INSTEAD.values() for name in re.findall(r"--(\w+)", text)}
    assert named <= known | {"num_processes"}


@pytest.mark.parametrize("name", ["chat_template_kwargs", "teachers", "model_init_kwargs"])
def test_broken_json_names_its_option(capsys: Any, name: str) -> None:
    assert main(["train", f"--{name}", "{enable_thinking: false}", *CPU]) == 2
    assert f"--{name} is {{enable_thinking: false}}, which is not JSON" in capsys.readouterr().err
