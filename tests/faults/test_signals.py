"""Ctrl-C and SIGTERM: a checkpoint is saved, the message says how to go on, and going on loses nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest
from doomed_runs import equal, exit_status, result_of, start
from tiny import tiny_trainer
from transformers import TrainerCallback

from topd.cli.main import main
from topd.errors import RunInterrupted
from topd.runs.checkpoints import damage
from topd.runs.interrupts import StopWhenAsked


class Flow:
    """What transformers gives to a callback."""

    def __init__(self, global_step, max_steps=9):
        self.global_step, self.max_steps = global_step, max_steps
        self.should_save = self.should_training_stop = False


def test_the_second_ctrl_c_stops_at_once_but_not_what_a_launcher_repeats(capfd):
    before = signal.getsignal(signal.SIGINT)
    stop = StopWhenAsked(bool)
    with stop.listening():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # at once, as launchers do
            os.kill(os.getpid(), number)
        stop._since -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("finishing this step") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_all_processes_stop_after_the_same_step():
    elsewhere = StopWhenAsked(lambda here: True)
    control = elsewhere.on_step_end(None, Flow(3), Flow(3))
    assert control.should_save
    assert control.should_training_stop
    assert elsewhere.stopped
    last = elsewhere.__class__(lambda here: True)
    assert not last.on_step_end(None, Flow(9), Flow(9)).should_save  # it is over anyway
    assert not last.stopped


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, number, fault):
    assert exit_status(tmp_path / "through") == 0
    process = start(tmp_path / "run", save_steps=500)
    while not (tmp_path / "run" / "audit.jsonl").exists():  # the first step is under way
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(120)
    message = (tmp_path / "run" / "message.txt").read_text()
    assert process.exitcode == number
    assert "--resume_from_checkpoint true" in message
    saved = next((tmp_path / "run").glob("checkpoint-*"))
    assert str(saved) in message
    assert damage(saved) is None
    assert exit_status(tmp_path / "run") == 0
    through, resumed = result_of(tmp_path / "through"), result_of(tmp_path / "run")
    assert [name for name in through if not equal(through[name], resumed[name])] == []
    fault(
        f"{number.name} between two checkpoints",
        f"finished the step, saved {saved.name}; equal when resumed, bit for bit",
    )


@pytest.fixture
def interruptible():
    """As from a terminal: a shell's background jobs ignore SIGINT, and so does Python in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_saves_nothing_is_simply_interrupted(tmp_path):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [Press()]})
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert not isinstance(stopped.value, RunInterrupted)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_run_that_saves_finishes_its_step(tmp_path):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"save_strategy": "steps", "save_steps": 500, "max_steps": 5}
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [Press()]}, **options)
    with pytest.raises(
        RunInterrupted, match=r"after step 2 of 5.*checkpoint-2.*--resume_from_checkpoint true"
    ) as stopped:
        trainer.train()
    assert stopped.value.signal == signal.SIGTERM
    assert damage(tmp_path / "checkpoint-2") is None


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(tmp_path, fault, capsys):
    """A real `topd train`, a real Ctrl-C, and the command that its message names."""
    command = [
        "train", "--config", "recipe:embedded", "--output_dir", str(tmp_path), "--disable_tqdm", "true",
        "--per_device_train_batch_size", "4", "--max_completion_length", "24",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "topd.cli", *command, "--max_steps", "500"], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "audit.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    saved = next(tmp_path.glob("checkpoint-*"))
    step = int(saved.name.split("-")[1])
    assert f"Stopped after step {step} of 500" in error
    assert main([*command, "--max_steps", str(step + 1)]) == 2  # not over an earlier run
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert main([*command, "--max_steps", str(step + 1), "--resume_from_checkpoint", "true"]) == 0
    assert (tmp_path / f"checkpoint-{step + 1}").is_dir()
    fault("Ctrl-C, topd train", f"exit status 130, saved {saved.name}, resumed", "nothing")
