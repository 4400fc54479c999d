"""A full disk, damaged checkpoints: the run ends or resumes with a message that names the last complete checkpoint."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from doomed_runs import equal, exit_status, result_of
from tiny import tiny_model, tiny_trainer

from topd.cli.main import main
from topd.errors import ResumeError, SavingError
from topd.runs import resumable_trainer as surviving
from topd.runs.checkpoints import CHECKSUMS, UNFINISHED, checkpoint_to_resume, damage, newest_whole

SAVES = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 6}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with three checkpoints."""
    out = tmp_path_factory.mktemp("run")
    tiny_trainer(out, **SAVES).train()
    return out


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def full_at(step, trainer, original):
    def write(*args, **kwargs):
        if trainer.state.global_step == step:
            raise FULL
        return original(*args, **kwargs)

    return write


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, monkeypatch, fault):
    trainer = tiny_trainer(tmp_path, **SAVES)
    monkeypatch.setattr(torch, "save", full_at(2, trainer, torch.save))
    with pytest.raises(SavingError, match=r"checkpoint-2 could not be .*No space left.*last complete .*checkpoint-1\b"):
        trainer.train()
    assert damage(tmp_path / "checkpoint-1") is None
    assert not (tmp_path / "checkpoint-2").exists()
    assert not (tmp_path / UNFINISHED).exists()  # it takes no room
    fault("disk full, optimizer's state", "a message that names checkpoint-1", "the steps since")


def test_a_full_disk_while_a_record_is_written(tmp_path, fault):
    trainer = tiny_trainer(tmp_path, audit_steps=1, **SAVES)
    (tmp_path / "audit.jsonl").symlink_to("/dev/full")
    with pytest.raises(SavingError, match=r"No space left.*no earlier checkpoint.*start again"):
        trainer.train()
    fault("disk full, audit record", "a message", "the steps since the last checkpoint")


@pytest.mark.slow
def test_no_file_grows_beyond_a_limit(tmp_path, fault):
    """A real limit of the system: the weights cannot be written, by safetensors itself."""
    assert exit_status(tmp_path, "disk full") == 2
    message = (tmp_path / "message.txt").read_text()
    assert "checkpoint-3 could not be written" in message
    assert str(tmp_path / "checkpoint-2") in message
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert exit_status(tmp_path) == 0
    assert exit_status(tmp_path / "through") == 0
    through, resumed = result_of(tmp_path / "through"), result_of(tmp_path)
    assert [name for name in through if not equal(through[name], resumed[name])] == []
    fault("disk full (RLIMIT_FSIZE), weights", "a message that names checkpoint-2; equal when resumed, bit for bit")


def test_a_full_disk_at_the_final_model(tmp_path, monkeypatch, capsys, fault):
    def fails(self, *args, _internal_call=False, **kwargs):
        if not _internal_call:
            raise FULL
        return save(self, *args, _internal_call=_internal_call, **kwargs)

    save = surviving.ResumableTrainer.save_model
    monkeypatch.setattr(surviving.ResumableTrainer, "save_model", fails)
    command = ["train", "--config", "recipe:embedded", "--output_dir", str(tmp_path), "--max_steps", "1"]
    small = ["--per_device_train_batch_size", "2", "--max_completion_length", "6", "--disable_tqdm", "true"]
    assert main([*command, *small]) == 2
    error = capsys.readouterr().err
    assert "The trained model" in error
    assert "checkpoint-1" in error
    fault("disk full, final model", "a message that names the last checkpoint")


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "half the weights": lambda folder: half(folder / "model.safetensors"),
    "half the optimizer's state": lambda folder: half(folder / "optimizer.pt"),
    "half the random states": lambda folder: half(folder / "rng_state.pth"),
    "half the trainer's state": lambda folder: half(folder / "trainer_state.json"),
    "an empty scheduler": lambda folder: os.truncate(folder / "scheduler.pt", 0),
    "a flipped bit in the weights": lambda folder: flip(folder / "model.safetensors"),
    "a flipped bit in the optimizer's state": lambda folder: flip(folder / "optimizer.pt"),
    "a flipped bit in the random states": lambda folder: flip(folder / "rng_state.pth"),
    "a flipped bit in the scheduler": lambda folder: flip(folder / "scheduler.pt"),
    "half the checksums": lambda folder: half(folder / CHECKSUMS),
    "no scheduler": lambda folder: (folder / "scheduler.pt").unlink(),
    "no optimizer's state": lambda folder: (folder / "optimizer.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "nothing but the name": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_resume_takes_the_newest_whole_checkpoint(copy, name, fault):
    DAMAGES[name](copy / "checkpoint-3")
    newest, passed_over = newest_whole(copy, thorough=True)
    assert newest == copy / "checkpoint-2"
    assert "checkpoint-3 is not complete" in passed_over[0]
    with pytest.raises(ResumeError, match=r"not a complete checkpoint.*checkpoint-2 is complete"):
        checkpoint_to_resume(str(copy / "checkpoint-3"), copy)
    fault(f"checkpoint damaged: {name}", "skipped; resumes from the previous one", "the steps since")


def test_a_lost_scheduler_is_seen_at_first_sight(copy):
    """transformers would begin the learning rate's warm-up again."""
    (copy / "checkpoint-3" / "scheduler.pt").unlink()
    assert (
        damage(copy / "checkpoint-3")
        == "there is no file with the scheduler's state; --save_only_model true saves none"
    )


def test_a_checkpoint_of_another_trainer_has_no_checksums(copy):
    (copy / "checkpoint-3" / CHECKSUMS).unlink()
    assert damage(copy / "checkpoint-3", thorough=True) is None


def test_damage_that_is_found_while_loading_is_called_damage(copy, monkeypatch):
    """Not code: `torch.load` raises the same error for both."""

    def raises(self, *args, **kwargs):
        flip(copy / "checkpoint-3" / "rng_state.pth")  # after the checksums were compared
        raise pickle.UnpicklingError("Weights only load failed")

    monkeypatch.setattr(transformers.Trainer, "_load_rng_state", raises)
    trainer = tiny_trainer(copy, student=tiny_model(5), **SAVES | {"max_steps": 4})
    with pytest.raises(ResumeError, match=r"rng_state.pth is damaged"):
        trainer.train(resume_from_checkpoint=True)


def test_a_resumed_run_passes_a_flipped_bit_over(copy, caplog):
    flip(copy / "checkpoint-3" / "optimizer.pt")
    trainer = tiny_trainer(copy, student=tiny_model(5), **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert "optimizer.pt is damaged" in caplog.text
    assert "resuming from" in caplog.text
    assert damage(copy / "checkpoint-3", thorough=True) is None  # written anew


def test_resume_true_in_python_too(copy):
    half(copy / "checkpoint-3" / "model.safetensors")
    trainer = tiny_trainer(copy, student=tiny_model(5), **SAVES)
    steps = []
    trainer.training_step = lambda *args, **kwargs: steps.append(1) or type(trainer).training_step(trainer, *args)
    trainer.train(resume_from_checkpoint=True)
    assert len(steps) == 1
    assert damage(copy / "checkpoint-3") is None  # written anew over the damaged one


def test_a_resumed_run_saves_and_logs_as_it_is_told(copy):
    """Not as the run that wrote the checkpoint was told."""
    options = SAVES | {"max_steps": 6, "save_steps": 2, "logging_steps": 3}
    trainer = tiny_trainer(copy, student=tiny_model(5), **options)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in copy.glob("checkpoint-*"))[3:] == ["checkpoint-4", "checkpoint-6"]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 6]


def test_no_whole_checkpoint_at_all(copy):
    for folder in copy.glob("checkpoint-*"):
        half(folder / "optimizer.pt")
    with pytest.raises(ResumeError, match=r"no checkpoint in \S+ to resume from: \S+checkpoint-3 is not complete"):
        checkpoint_to_resume(True, copy)


def test_a_checkpoint_of_the_model_only_says_which_option_made_it(copy):
    for folder in copy.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(ResumeError, match=r"no file with the optimizer's state; --save_only_model true saves none"):
        checkpoint_to_resume(True, copy)


def test_other_folders_are_no_checkpoints(copy):
    shutil.copytree(copy / "checkpoint-3", copy / "checkpoint-99-backup")
    (copy / "checkpoint-98").write_text("a file")
    assert newest_whole(copy)[0] == copy / "checkpoint-3"


def test_only_so_many_checkpoints_are_kept(tmp_path):
    tiny_trainer(tmp_path, save_total_limit=2, **SAVES).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_is_named_where_it_lies(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    dataset = tiny_trainer(tmp_path / "other").train_dataset.select(range(4))
    trainer = tiny_trainer(tmp_path / "run", trainer_options={"eval_dataset": dataset}, **SAVES | options)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).parent == tmp_path / "run"
    stored = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert Path(stored["best_model_checkpoint"]).is_dir()


def test_a_damaged_best_checkpoint_is_not_loaded_at_the_end(copy, caplog, fault):
    trainer = tiny_trainer(copy)
    before = [parameter.clone() for parameter in trainer.model.parameters()]

    def changed_by(checkpoint):
        trainer.state.best_model_checkpoint = str(checkpoint)
        trainer._load_best_model()
        return not all(map(torch.equal, before, trainer.model.parameters()))

    flip(copy / "checkpoint-2" / "model.safetensors")
    assert not changed_by(copy / "checkpoint-2")
    assert "checkpoint-2, the best checkpoint, is damaged: model.safetensors is damaged" in caplog.text
    assert changed_by(copy / "checkpoint-1")
    fault("the best checkpoint damaged, load_best_model_at_end", "a warning; the model stays that of the last step")


def test_a_new_run_keeps_the_records_of_an_earlier_one(tmp_path):
    for _ in range(2):
        tiny_trainer(tmp_path, max_steps=1, audit_steps=1, max_completion_length=6).train()
    assert (tmp_path / "audit.earlier.jsonl").read_text() == (tmp_path / "audit.jsonl").read_text()


def test_records_with_any_line_separator_survive_the_cut(tmp_path):
    from topd.runs.files import append_records
    from topd.runs.records import cut_records

    file = tmp_path / "audit.jsonl"
    records = [{"step": step, "prompt": "a\u2028b\x85c"} for step in (1, 2, 3)]
    append_records(records, file)
    cut_records(file, 2)
    assert [json.loads(line) for line in file.read_text().split("\n") if line] == records[:2]
