"""Two commands never write into one folder at a time."""

import os
import signal
import subprocess
import sys

import pytest
from tiny import tiny_trainer

from topd.cli.main import main
from topd.errors import TOPDError
from topd.runs.sole_writer import LOCK, sole_writer

HOLDER = """
import sys, time
from pathlib import Path
from topd.runs.sole_writer import sole_writer
with sole_writer(Path(sys.argv[1]), *sys.argv[2:]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Hold a folder in another process."""
    holders = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        holders.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in holders:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_is_held_by_one_process_and_free_after_kill_9(tmp_path, hold):
    holder = hold(tmp_path / "out")
    with pytest.raises(TOPDError, match=rf"out is in use by another command \(process {holder.pid} on .*use another"):
        sole_writer(tmp_path / "out").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole_writer(tmp_path / "out"), sole_writer(tmp_path / "out"):  # a process may hold it more than once
        (tmp_path / "out" / "result").touch()
    assert os.listdir(tmp_path / "out") == ["result"]
    with sole_writer(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).exists()
    assert not (tmp_path / "new").exists()  # nothing was written


WRITE = {
    "train": ["train", "--config", "recipe:embedded", "--output_dir"],
    "warmstart": ["warmstart", "--config", "recipe:embedded-warmstart", "--data", "x.jsonl", "--output_dir"],
    "probe": ["probe", "--out"],
    "correct": ["correct", "--out"],
    "study": ["study", "--config", "studies/embedded.yaml", "--out"],
    "demo": ["demo", "--out"],
}


@pytest.mark.parametrize("command", WRITE)
def test_commands_that_write_into_one_folder_are_refused(tmp_path, hold, capsys, command, fault):
    hold(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main([*WRITE[command], str(tmp_path)]) == 2
    assert "is in use by another command" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    fault(f"topd {command} into a folder that another one writes into", "refused; names the process that holds it")


def test_eval_and_generate_hold_what_they_write_and_not_their_neighbours(tmp_path, hold, capsys):
    small = ["--limit", "2", "--max-new-tokens", "4", "--samples", "1"]
    generate = ["generate", "--teacher", "embedded:teacher", "--data", "embedded", *small, "--out"]
    evaluate = ["eval", "--model", "student=embedded:student-standard", "--benchmark", "embedded", "--out"]
    hold(tmp_path / "student")
    hold(tmp_path, "_mine.lock")
    assert main([*evaluate, str(tmp_path), *small]) == 2
    assert main([*generate, str(tmp_path / "mine.parquet")]) == 2
    assert capsys.readouterr().err.count("is in use by another command") == 2
    assert main([*generate, str(tmp_path / "other.jsonl")]) == 0


def test_two_trainers_do_not_write_into_one_folder(tmp_path, hold):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    hold(tmp_path)
    with pytest.raises(TOPDError, match="is in use by another command"):
        trainer.train()
    assert trainer.state.global_step == 0
