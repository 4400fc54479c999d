"""Arguments that several commands take: JSON objects, and a training run's YAML file for the analyses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from topd.cli import analyses
from topd.cli.arguments import json_object
from topd.cli.main import main

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
"""


def parsed(tmp_path: Path, *more: str, command: str = "probe") -> argparse.Namespace:
    file = tmp_path / "run.yaml"
    file.write_text(RECIPE)
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    analyses.add_probe(commands)
    analyses.add_correct(commands)
    return parser.parse_args([command, "--config", str(file), *more])


def test_a_probe_measures_what_the_run_will_train_on(tmp_path: Path) -> None:
    options = parsed(tmp_path)
    found = {name: getattr(options, name) for name in (
        "student", "teacher", "data", "temperature", "max_new_tokens", "window_length", "share", "embedding", "cost",
        "seed", "chat_template_kwargs",
    )}  # fmt: skip
    assert found == {
        "student": "my-student", "teacher": "my-teacher", "data": "my.jsonl", "temperature": 0.7, "max_new_tokens": 77,
        "window_length": [9], "share": 0.05, "embedding": ["teacher"], "cost": ["sqeuclidean"], "seed": 5,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


@pytest.mark.parametrize("command", ["probe", "correct"])
def test_options_after_the_file_win(tmp_path: Path, command: str) -> None:
    options = parsed(tmp_path, "--temperature", "1", "--chat-template-kwargs", '{"a": 1}', command=command)
    assert (options.temperature, options.chat_template_kwargs, options.student) == (1.0, {"a": 1}, "my-student")


def test_a_file_that_is_not_there_ends_in_a_message(capsys: Any) -> None:
    assert main(["probe", "--config", "gone.yaml"]) == 2
    assert "gone.yaml: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1]", "3", "{", "nonsense"])
def test_what_is_no_json_object_is_said(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write a JSON object"):
        json_object(text)
    assert json_object('{"enable_thinking": false}') == {"enable_thinking": False}
