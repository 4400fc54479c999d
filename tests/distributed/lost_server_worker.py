"""One process of two: the last of them loses the teacher's server, or is asked to stop while it waits for it.

lost_server_worker.py FOLDER CASES.json      (CASES: name -> {"url": ..., "ends": "lost" or "stopped"})
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import pytest
import torch
from accelerate.utils import gather_object
from distributed.worker import main
from doomed_runs import STEPS, equal
from tiny import TOKENIZER, prompts, tiny_config, tiny_model

from topd.errors import RunInterrupted, ServerError
from topd.runs.checkpoints import damage
from topd.teachers.openai_server import WaitingStopped
from topd.training import TOPDTrainer

ENDS = {"lost": (ServerError, ServerError("no server here")), "stopped": (RunInterrupted, WaitingStopped())}


def trainer_of(out: Path, url: str) -> TOPDTrainer:
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "max_completion_length": 8}
    args = tiny_config(out, teacher_model_server_url=url, per_device_train_batch_size=2, **options)
    return TOPDTrainer(tiny_model(0), args=args, train_dataset=prompts(), processing_class=TOKENIZER)


def run_case(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train undisturbed; train and fail in the fourth step, in the last process only; resume."""
    through = trainer_of(folder / name / "through", options["url"])
    through.train()
    kind, failure = ENDS[options["ends"]]
    cut = trainer_of(folder / name / "cut", options["url"])
    server = cut._server.server
    ask = server.post_all

    def fails(*args: Any) -> Any:
        if cut.state.global_step == 3 and cut.accelerator.is_last_process:
            raise failure
        return ask(*args)

    server.post_all = fails
    with pytest.raises(kind) as ended:
        cut.train()
    said = gather_object([str(ended.value)])
    whole = damage(folder / name / "cut" / "checkpoint-3")
    resumed = trainer_of(folder / name / "cut", options["url"])
    resumed.train(resume_from_checkpoint=True)
    same = gather_object([equal(through.model.state_dict(), resumed.model.state_dict())])
    random = gather_object([torch.equal(*(states(folder / name / each, cut) for each in ("through", "cut")))])
    return {"said": said, "damage": whole, "weights": same, "random states": random}


def states(out: Path, trainer: Any) -> torch.Tensor:
    file = out / f"checkpoint-{STEPS}" / f"rng_state_{trainer.accelerator.process_index}.pth"
    return torch.load(file, weights_only=False)["cpu"]


if __name__ == "__main__":
    main(run_case)
