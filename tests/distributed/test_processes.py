"""Two processes train as one does on the same batch: DDP and FSDP2, with gloo on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.worker import run_case
from loading.test_shared_base import adapter_on
from peft import PeftModel
from teachers.fake_server import serving
from tiny import TOKENIZER, tiny_model
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parents[1]
LAUNCH = {
    "ddp": ["--multi_gpu"],  # processes, also on CPUs: with --cpu accelerate launches one only
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
}
ROLLOUT = {"method": "topd", "student_window": "rollout"}
REGENERATED = {"method": "topd", "student_window": "regenerated"}


def two_processes(kind: str, folder: Path, cases: dict[str, Any], worker: str = "worker.py") -> dict[str, Any]:
    """Train every case in two processes; what the first process saved."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *LAUNCH[kind]),
        *(str(TESTS / "distributed" / worker), str(folder), str(folder / "cases.json")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


def check_equal(two: dict[str, Any], one: dict[str, Any], start: dict[str, torch.Tensor], skip: str) -> None:
    """The same losses, metrics and weights: relative 1e-4 (float32 sums in another order, over a few steps)."""
    assert len(two["log"]) == len(one["log"]) > 0
    for ours, reference in zip(two["log"], one["log"], strict=True):
        others = [
            key
            for key in reference
            if key.startswith(("seconds/", "step_time", "rollouts_per_second", "guidance/grad_ratio", skip))
        ]
        compared = {key: value for key, value in reference.items() if key not in others and value is not None}
        assert {key: ours[key] for key in compared} == pytest.approx(compared, rel=1e-4, abs=1e-6)
    assert two["weights"].keys() == one["weights"].keys() == start.keys()
    moved = sum((one["weights"][name] - start[name]).norm() ** 2 for name in start) ** 0.5
    apart = sum((two["weights"][name] - one["weights"][name]).norm() ** 2 for name in start) ** 0.5
    assert moved > 0.03
    assert apart <= 1e-3 * moved


def compare(kind: str, tmp_path: Path, cases: dict[str, Any]) -> dict[str, Any]:
    start = tiny_model(0).state_dict()
    results = two_processes(kind, tmp_path / kind, cases)
    for name, options in cases.items():
        skip = "entropy" if "gradient_accumulation_steps" in options else "no key"  # TRL's mean over micro-batches
        check_equal(results[name], run_case(tmp_path / "one", name, options), start, skip)
    return results


FEW = {**ROLLOUT, "fork_threshold": 0.86, "embedding": "student_hidden", "batch_size": 2}
CASES = {
    "opd": {"method": "opd", "opd_loss": "trl"},
    "random_share": {"method": "opd", "token_share": 0.4},
    "rollout": ROLLOUT,
    "accumulated": REGENERATED | {"batch_size": 2, "gradient_accumulation_steps": 2, "guidance_reduction": "sum"},
    "uneven": ROLLOUT | {"prompts": 10, "num_train_epochs": 2, "max_steps": -1},
    "teacher_contexts": ROLLOUT | {"guidance_context": "teacher"},
    "several_updates": ROLLOUT | {"num_iterations": 2, "prefix_weight_max": 4.0},
    "checkpointing": REGENERATED | {"gradient_checkpointing": True},
}


def test_two_processes_of_ddp_train_as_one_process_does(tmp_path):
    results = compare("ddp", tmp_path, {"regenerated": REGENERATED, "few": FEW})
    guided = zip(*results["few"]["guided"], strict=True)
    assert any(min(counts) == 0 < max(counts) for counts in guided)  # at a step, one process had no fork


@pytest.mark.slow
def test_every_way_to_train_is_the_same_in_two_processes_of_ddp(tmp_path):
    results = compare("ddp", tmp_path, CASES)
    assert len(results["uneven"]["log"]) == 4  # 10 prompts are two batches of 4; what is left over is dropped


@pytest.mark.slow
def test_every_way_to_train_is_the_same_in_two_processes_of_fsdp2(tmp_path):
    """Both models sharded, and (under FSDP's memory-saving loading) read from disk by the first process alone."""
    models = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    for seed, (role, width) in enumerate({"student": 64, "teacher": 96}.items()):
        tiny_model(seed, width).save_pretrained(models[role])
        TOKENIZER.save_pretrained(models[role])
    waves = {"window_memory": 1e-6}  # one rollout at a time
    cases = CASES | {"regenerated": REGENERATED | waves, "few": FEW, "loaded": ROLLOUT | models}
    with serving(
        tiny_model(1, 96), TOKENIZER
    ) as fake:  # the teacher's forward passes are in step, its windows elsewhere
        cases |= {"served": REGENERATED | waves | {"teacher_model_server_url": fake.url}}
        results = compare("fsdp2", tmp_path, cases)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp2" / "loaded" / "saved").state_dict()
    assert all(torch.equal(saved[name], weights) for name, weights in results["loaded"]["weights"].items())
    assert all(result["teacher_held"] == pytest.approx(0.5, abs=0.02) for result in results.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_answer_held_out_problems_as_one_does(tmp_path, kind):
    """Seven problems: one process has four, the other three."""
    options = {"eval_benchmark": "embedded", "eval_benchmark_limit": 7, "eval_strategy": "steps", "eval_steps": 1}
    case = ROLLOUT | options | {"eval_samples": 2, "eval_temperature": 0.6, "eval_on_start": True, "max_steps": 2}
    results = compare(kind, tmp_path, {"answered": case})
    one, two = (
        [json.loads(line) for line in (tmp_path / folder / "answered" / "eval_responses.jsonl").open()]
        for folder in ("one", kind)
    )
    assert [record["response"] for record in two] == [record["response"] for record in one]
    assert [entry["step"] for entry in results["answered"]["evaluations"]] == [0, 1, 2]
    assert len(one) == 3 * 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_adapters_of_one_base_are_the_same_in_two_processes(tmp_path, kind):
    """Under DDP on one set of weights in each process; under FSDP2 the teacher has its own, merged base."""
    tiny_model(0).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    models = {role: adapter_on(tmp_path / "base", role, seed) for seed, role in enumerate(("student", "teacher"))}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    start = PeftModel.from_pretrained(base, models["student"]).state_dict()
    cases = {"rollout": ROLLOUT | models, "regenerated": REGENERATED | models}
    results = two_processes(kind, tmp_path / kind, cases)
    for name, options in cases.items():
        check_equal(results[name], run_case(tmp_path / "one", name, options), start, "no key")


SEVERAL = {"several_teachers": {"a": [1, 96], "b": [2, 32]}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_several_teachers_are_the_same_in_two_processes(tmp_path, kind):
    """Also where a process has rows of one teacher only (two rows each), and where teachers are read from disk."""
    folders = {name: str(tmp_path / name) for name in "ab"}
    for seed, folder in enumerate(folders.values(), 1):
        tiny_model(seed, 96).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    cases = {
        "regenerated": REGENERATED | SEVERAL,
        "teacher_contexts": ROLLOUT | SEVERAL | {"guidance_context": "teacher"},
        "opd": {"method": "opd", "opd_loss": "one_pass"} | SEVERAL,
        "accumulated": ROLLOUT | SEVERAL | {"batch_size": 2, "gradient_accumulation_steps": 2},
        "loaded": ROLLOUT | {"several_teachers": folders},
    }
    results = compare(kind, tmp_path, cases)
    held = 0.5 if kind == "fsdp2" else 1.0
    assert all(result["teacher_held"] == pytest.approx(held, abs=0.02) for result in results.values())


@pytest.mark.slow
def test_a_name_without_a_teacher_that_one_process_meets_in_a_stream_ends_both(tmp_path):
    case = ROLLOUT | SEVERAL | {"stream": True, "prompts": 8, "names": "abababac", "refused": True}
    said = two_processes("ddp", tmp_path / "ddp", {"stream": case})["stream"]["said"]
    assert [message.startswith("The dataset's column 'teacher' names c") for message in said] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_process_without_candidates_holds_nobody_up(tmp_path, kind):
    cases = {
        "rollout": ROLLOUT | {"none_in_last_process": True},
        "regenerated": REGENERATED | {"none_in_last_process": True, "embedding": "teacher_hidden"},
    }
    for result in two_processes(kind, tmp_path / kind, cases).values():
        assert [entry["forks/per_rollout"] > 0 for entry in result["log"]] == [True] * 3
        assert result["guided"][1] == [0, 0, 0]


@pytest.mark.slow
def test_if_one_process_loses_the_server_both_save_the_step_s_beginning(tmp_path):
    with serving(tiny_model(1, 96), TOKENIZER) as fake:
        cases = {ends: {"url": fake.url, "ends": ends} for ends in ("lost", "stopped")}
        results = two_processes("ddp", tmp_path / "ddp", cases, "lost_server_worker.py")
    assert [message[:10] for message in results["lost"]["said"]] == ["Another pr", "no server "]
    assert all("after step 3 of 5" in message for message in results["stopped"]["said"])
    for result in results.values():
        assert result["damage"] is None
        assert result["weights"] == result["random states"] == [True, True]
