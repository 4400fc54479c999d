"""Two processes warm-start as one does on the same batch: DDP and FSDP2, with gloo on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from warmstart.processes_worker import run_case

LAUNCH = {
    "ddp": ["--multi_gpu"],  # processes, also on CPUs: with --cpu accelerate launches one only
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
}
CASES = {
    "half": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "packed": {"batch_size": 2, "packing": True, "max_length": 256, "max_steps": 2},
    "kl": {"kd_ratio": 1.0},
    "sft": {"kd_ratio": 1e-12},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(tmp_path, kind):
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *LAUNCH[kind]),
        *(str(Path(__file__).with_name("processes_worker.py")), str(tmp_path), str(tmp_path / "cases.json")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    start = tiny_model(0).state_dict()
    for name, options in CASES.items():
        two, one = torch.load(tmp_path / f"{name}.pt"), run_case(tmp_path / "one", name, options)
        assert len(two["log"]) == len(one["log"]) > 0
        for ours, reference in zip(two["log"], one["log"], strict=True):
            assert ours == pytest.approx(reference, rel=1e-4, abs=1e-6)
        moved = sum((one["weights"][key] - start[key]).norm() ** 2 for key in start) ** 0.5
        apart = sum((two["weights"][key] - one["weights"][key]).norm() ** 2 for key in start) ** 0.5
        assert apart <= 1e-3 * moved
        assert two["teacher_held"] == pytest.approx(0.5 if kind == "fsdp2" else 1.0, abs=0.02)
