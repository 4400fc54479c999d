"""`topd train --num_processes N`: which words go to accelerate's launcher, and what runs in the processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from topd.cli import launch as module
from topd.cli.launch import TYPED, launch, split
from topd.cli.main import main
from topd.cli.options import option_names
from topd.cli.train import page, parse
from topd.errors import TOPDError

KNOWN = option_names(page().kinds) | {"config"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be started, and with which environment."""
    found: list[Any] = []
    monkeypatch.setattr(module, "_started", lambda words, environment: found.append((words, environment)) or 7)
    for name in ("LOCAL_RANK", TYPED):
        monkeypatch.delenv(name, raising=False)
    return found


def test_words_are_split_between_the_command_and_the_launcher() -> None:
    words = ["my.yaml", "--num-processes", "2", "--max_steps", "3", "--fsdp_version=2", "--report_to", "a", "b",
             "--use_fsdp", "--gradient_accumulation_steps", "4"]  # fmt: skip
    own, others = split(words, KNOWN)
    assert own == ["my.yaml", "--max_steps", "3", "--report_to", "a", "b", "--gradient_accumulation_steps", "4"]
    assert others == ["--num_processes", "2", "--fsdp_version=2", "--use_fsdp"]
    assert parse([*words[1:], "--use_cpu", "true", "--bf16", "false"])[1].max_steps == 3


def test_processes_alone_are_ddp(started: list[Any]) -> None:
    argv = ["recipe:embedded", "--num_processes", "2", "--max_steps", "3"]
    assert launch("train", argv, {}, KNOWN) == 7
    ((words, environment),) = started
    place = words.index("--module")
    assert words[place:] == ["--module", "topd.cli", "train", "recipe:embedded", "--max_steps", "3"]
    assert words[:3] == ["--multi_gpu", "--num_processes", "2"]
    assert json.loads(environment[TYPED]) == ["train", *argv]
    options = module._parser().parse_args(words)
    assert (options.num_processes, options.multi_gpu, options.main_process_port) == (2, True, 0)
    assert options.training_script_args == ["train", "recipe:embedded", "--max_steps", "3"]


def test_a_config_of_trl_by_name_and_options_in_the_yaml_file(started: list[Any]) -> None:
    in_file = {"max_steps": 3, "accelerate_config": "fsdp2", "num-processes": 3, "use_fsdp": True}
    assert launch("warmstart", ["--num_processes", "2"], in_file, KNOWN) == 7
    options = module._parser().parse_args(started[0][0])
    config = yaml.safe_load(Path(options.config_file).read_text())
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert (options.num_processes, options.use_fsdp, options.multi_gpu) == (2, True, False)
    with pytest.raises(TOPDError, match=r"no such file. TRL ships: fsdp1, fsdp2, .*zero3"):
        launch("train", ["--accelerate_config", "zero4"], {}, KNOWN)


def test_one_process_is_this_one(started: list[Any], tmp_path: Path) -> None:
    assert launch("train", ["--max_steps", "3"], {"bf16": True}, KNOWN) is None
    assert launch("train", ["--num_processes", "1"], {}, KNOWN) is None
    file = tmp_path / "mine.yaml"
    file.write_text("num_processes: 1\nmax_steps: 5\nuse_cpu: true\nbf16: false\n")
    assert parse([str(file)])[1].max_steps == 5
    assert started == []


def test_a_started_process_starts_no_others(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch("train", ["--max_steps", "3"], {"num_processes": 2}, KNOWN) is None
    with pytest.raises(TOPDError, match="give --num_processes to it"):
        launch("train", ["--num_processes", "2"], {}, KNOWN)
    assert started == []


def test_mistakes_are_told_once_before_anything_is_started(started: list[Any], capsys: Any) -> None:
    assert main(["train", "recipe:embedded", "--num_processes", "2", "--windw_length", "3"]) == 2
    assert "Did you mean --window_length" in capsys.readouterr().err
    assert started == []


def test_launcher_options_with_a_wrong_value_end_in_a_message(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", TYPED):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "recipe:embedded", "--num_processes", "two"]) == 2
    assert (
        "accelerate's launcher: argument --num_processes/--num-processes: invalid int value" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_two_processes_train_and_failures_keep_their_exit_status(tmp_path: Path) -> None:
    def topd(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "topd.cli", "train", "recipe:embedded", "--num_processes", "2", *words]
        environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", TYPED)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    out = tmp_path / "run"
    small = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--data_limit", "16", "--output_dir", str(out)]
    done = topd(*small)
    assert done.returncode == 0, done.stderr
    assert "8 rows per step (4 per process and batch, 1 accumulated, 2 processes)" in done.stdout
    made_of = yaml.safe_load((out / "run.yaml").read_text())["provenance"]
    assert made_of["processes"] == 2
    assert made_of["command"].startswith("topd train recipe:embedded --num_processes 2 --max_steps 1")
    failed = topd(*small, "--window_length", "0")
    assert failed.returncode == 2
    assert "window_length must be at least 1" in failed.stderr
    assert "Traceback" not in failed.stderr
