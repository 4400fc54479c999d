"""One process of several: train tiny models in each case, and save what came out. Run by `accelerate launch`.

worker.py FOLDER CASES.json      (CASES: name -> options of TOPDConfig; batch sizes are global)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import gather_object
from tiny import prompts, tiny_model, tiny_trainer
from torch.distributed.tensor import DTensor

from topd.errors import TOPDError
from topd.near_future import Places
from topd.training import TOPDTrainer, step
from topd.training.method import choose_candidates
from topd.training.several_teachers import MOPDTrainer

GREEDY = {"do_sample": False, "temperature": 1.0}  # the same rollouts, however prompts are dealt out


class Counting(TOPDTrainer):
    """Remembers how many windows this process guided at each step."""

    def _record(self, future: Any, guided: Any, rollouts: Any, method: Any) -> None:
        self.__dict__.setdefault("guided", []).append(int(future.guided.sum()))
        super()._record(future, guided, rollouts, method)


class CountingSeveral(Counting, MOPDTrainer):
    pass


def several_teachers(given: dict[str, Any]) -> dict[str, Any]:
    """Teachers by name: folders as they are; of [seed, width] tiny models."""
    return {name: each if isinstance(each, str) else tiny_model(*each) for name, each in given.items()}


def run_case(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train; return the log, the weights, and what each process had."""
    options = dict(options)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options["per_device_train_batch_size"] = options.pop("batch_size", 4) // processes
    models = {role: options.pop(role) for role in ("student", "teacher") if role in options}
    if options.pop("none_in_last_process", False):
        step.choose_candidates = none_in_last_process
    dataset, kind = prompts(options.pop("prompts", 64)), Counting
    if several := options.pop("several_teachers", None):
        names = [*(options.pop("names", several))]
        kind, models["teacher"] = CountingSeveral, several_teachers(several)
        dataset = dataset.add_column("teacher", [names[i % len(names)] for i in range(len(dataset))])
    refused = options.pop("refused", False)
    dataset = dataset.to_iterable_dataset() if options.pop("stream", False) else dataset
    trainer = tiny_trainer(
        folder / name, kind, dataset=dataset, **models,
        **{"optim": "sgd", "learning_rate": 0.03, "generation_kwargs": GREEDY} | options,
    )  # fmt: skip
    if refused:
        with pytest.raises(TOPDError) as refusal:
            trainer.train()
        return {"said": gather_object([str(refusal.value)])}
    trainer.train()
    trainer.save_model(str(folder / name / "saved"))
    teachers = trainer._teachers if several else [trainer.teacher_model]
    teacher = [parameter for model in teachers for parameter in model.parameters()]
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in teacher)
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluations": [entry for entry in trainer.state.log_history if "eval_accuracy" in entry],
        "weights": trainer.accelerator.get_state_dict(trainer.model),
        "guided": gather_object([trainer.__dict__.get("guided")]),
        "teacher_held": held / sum(p.numel() for p in teacher),
    }


def none_in_last_process(*args: Any) -> Places:
    """As if no rollout of the last process had a candidate."""
    chosen = choose_candidates(*args)
    return chosen[:0] if PartialState().is_last_process else chosen


def fsdp_on_cpu() -> None:
    """accelerate 1.15 reads FSDP's settings for accelerators only, and runs DDP on CPUs. Let it shard there too."""
    original = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def main(run_case: Callable[[Path, str, dict[str, Any]], dict[str, Any]]) -> None:
    """All cases of the command line, then an end that gloo's threads cannot spoil: they sometimes abort a process."""
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu()
    for name, options in cases.items():
        result = run_case(folder, name, options)
        if PartialState().is_main_process:
            torch.save(result, folder / f"{name}.pt")
    PartialState().wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main(run_case)
