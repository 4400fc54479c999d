"""`topd ... | head`: nobody reads the output any more. A run goes on; other commands end quietly."""

import io
import os
import subprocess
import sys

import pytest
from report.made_records import record, write_arm

from topd.runs.guard import output_may_close
from topd.runs.interrupts import StopWhenAsked

TRAIN = [
    "train", "--model_name_or_path", "embedded:student-standard",
    "--teacher_model_name_or_path", "embedded:teacher",
    "--data", "embedded", "--use_cpu", "true", "--bf16", "false", "--max_steps", "3",
    "--per_device_train_batch_size", "2", "--max_completion_length", "6", "--window_length", "3",
    "--logging_steps", "1",
]  # fmt: skip


def closed(monkeypatch, name):
    """A standard stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, name, stream)
    return stream


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_training_goes_on_without_its_output(monkeypatch, capsys, name):
    closed(monkeypatch, name)
    with output_may_close(continues=True):
        for line in range(3):
            print(line, file=getattr(sys, name), flush=True)
    if name == "stdout":
        assert capsys.readouterr().err.count("the run continues without it") == 1


def test_other_commands_end_quietly(monkeypatch, capsys):
    closed(monkeypatch, "stdout")
    with pytest.raises(SystemExit) as ended, output_may_close(continues=False):
        print("a line")
    assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_characters_that_the_terminal_lacks_are_shown_as_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    with output_may_close(continues=True):
        print("2×3 \ud800")
    assert written.getvalue() == b"2\\xd73 \\ud800\n"


def test_ctrl_c_is_heard_without_anybody_to_tell(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    stop = StopWhenAsked(bool)
    stop._ask(2, None)
    assert stop.received == 2


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "topd.cli", *map(str, arguments)], stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True], ids=["head", "both streams"])
def test_a_run_into_head_trains_to_its_end(tmp_path, fault, both):
    process = start([*TRAIN, "--output_dir", tmp_path], stderr=subprocess.STDOUT if both else subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = "" if both else process.stderr.read()
    assert process.wait(300) == 0, error
    assert "Traceback" not in error
    assert (tmp_path / "model.safetensors").exists()
    fault(f"topd train {'2>&1 ' if both else ''}| head", "trains to its end without output")


@pytest.mark.slow
def test_a_report_into_nowhere_ends_quietly(tmp_path, fault):
    write_arm(tmp_path, [record()])
    process = start(["report", tmp_path], stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(300) == 141
    assert (tmp_path / "report.html").exists()
    fault("topd report | head", "ends quietly, exit status 141")
