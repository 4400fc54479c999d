"""Tiny runs of the embedded pair in processes of their own, which end themselves by SIGKILL at a chosen moment."""

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import prompts, tiny_trainer

from topd.embedded.pair import pair_folder
from topd.errors import RunInterrupted, TOPDError
from topd.runs import resumable_trainer as surviving
from topd.runs.checkpoints import newest_whole
from topd.training import TOPDTrainer, step_log

STEPS = 5
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["topd.training.trainer", "topd.demo.build"])  # imported once; nothing computed


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class Doomed(TOPDTrainer):
    """Dies at a moment, in the step after the third."""

    moment = ""

    def at(self, moment):
        if self.moment == moment and self.state.global_step == 3:
            die()

    def _generate_single_turn(self, *args, **kwargs):
        output = super()._generate_single_turn(*args, **kwargs)
        self.at("rollouts sampled")
        return output

    def training_step(self, *args, **kwargs):
        output = super().training_step(*args, **kwargs)
        self.at("gradients there")
        return output

    def _get_learning_rate(self):  # called between the optimizer's step and the count of steps
        self.at("weights moved")
        return super()._get_learning_rate()

    def _save_checkpoint(self, *args, **kwargs):
        if self.moment == "disk full" and self.state.global_step == 3:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # no file grows beyond 1 MiB
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, folder):
        self.at("checkpoint: weights written")
        super()._save_optimizer_and_scheduler(folder)

    def _save_rng_state(self, folder):
        super()._save_rng_state(folder)
        if self.moment == "checkpoint: a file half written" and self.state.global_step == 3:
            file = Path(folder) / "rng_state.pth"
            os.truncate(file, file.stat().st_size // 2)
            die()


def doom(moment):
    """Moments outside the trainer's methods."""
    Doomed.moment = moment
    if moment == "checkpoint: before the rename":
        rename = surviving.put_in_place
        surviving.put_in_place = lambda written, place: (
            die() if place.name == "checkpoint-3" else rename(written, place)
        )
    if moment == "checkpoint: after the rename":
        rotate = surviving.rotate_checkpoints
        surviving.rotate_checkpoints = lambda folder, *rest, **options: (
            die() if (Path(folder) / "checkpoint-3").exists() else rotate(folder, *rest, **options)
        )
    if moment == "a record half written":
        append = step_log.append_records

        def half(records, path):
            append(records, path)
            if records[0]["step"] == 4:
                os.truncate(path, path.stat().st_size - 40)
                die()

        step_log.append_records = half


def train(out, moment="", **options):
    """Train to the end, from the newest complete checkpoint if there is one."""
    torch.set_num_threads(1)
    doom(moment)
    given = {
        "max_steps": STEPS, "max_completion_length": 24, "save_strategy": "steps", "save_steps": 1, "audit_steps": 1,
        "dataset": prompts(12),  # three steps an epoch: the run goes on in the second
    }  # fmt: skip
    run = tiny_trainer(
        out, Doomed, student=str(pair_folder("student-standard")), teacher=str(pair_folder("teacher")),
        **given | options,
    )  # fmt: skip
    try:
        run.train(resume_from_checkpoint=newest_whole(Path(out))[0] is not None)
    except (TOPDError, RunInterrupted) as error:
        (Path(out) / "message.txt").write_text(str(error))
        raise SystemExit(getattr(error, "signal", 2)) from None


def start(out, moment="", **options):
    process = PROCESSES.Process(target=train, args=(str(out), moment), kwargs=options)
    process.start()
    return process


def exit_status(out, moment="", **options):
    process = start(out, moment, **options)
    process.join(120)
    return process.exitcode


def result_of(out, step=STEPS):
    """Everything that two equal runs agree on, without clocks."""
    folder = Path(out) / f"checkpoint-{step}"
    state = json.loads((folder / "trainer_state.json").read_text())
    clocks = ("seconds/", "step_time", "rollouts_per_second", "train_", "total_flos")
    log = [{k: v for k, v in entry.items() if not k.startswith(clocks)} for entry in state["log_history"]]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(folder / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(folder / "scheduler.pt", weights_only=True),
        "random": torch.load(folder / "rng_state.pth", weights_only=False),
        "log": log,
        "audit": (Path(out) / "audit.jsonl").read_text().splitlines(),
    }


def equal(a, b):
    """Bit for bit, through dicts, lists, tensors and arrays."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "tobytes"):
        return a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b
