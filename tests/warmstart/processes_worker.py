"""One process of several: a few steps of the warm start, and what came out. Run by `accelerate launch`.

processes_worker.py FOLDER CASES.json      (CASES: name -> options of WarmStartConfig; batch sizes are global)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed.worker import main
from torch.distributed.tensor import DTensor
from warmstart.test_warmstart_trainer import trainer


def run_case(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train; return the log, the weights, and the share of the teacher that this process held."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = options.get("batch_size", 4) // processes
    rest = {key: value for key, value in options.items() if key != "batch_size"}
    trained = trainer(folder / name, per_device_train_batch_size=batch, **rest)
    trained.train()
    teacher = list(trained.teacher_model.parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in teacher)
    return {
        "log": [entry for entry in trained.state.log_history if "loss" in entry],
        "weights": trained.accelerator.get_state_dict(trained.model),
        "teacher_held": held / sum(p.numel() for p in teacher),
    }


if __name__ == "__main__":
    main(run_case)
