"""`topd warmstart`, and the paper's two stages one after the other."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd.cli.main import main
from topd.cli.warmstart import SolutionArguments
from topd.cli.warmstart import solutions as training_rows
from topd.embedded.pair import pair_folder
from topd.embedded.task import TEACHER, make_problems, write_solution
from topd.embedded.tokenizer import build_tokenizer
from topd.evaluation.embedded import greedy_accuracy
from topd.warmstart import WarmStartConfig, WarmStartTrainer

RECIPE = ["warmstart", "--config", "recipe:embedded-warmstart"]
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    import random

    rng, file = random.Random(0), tmp_path_factory.mktemp("solutions") / "solutions.jsonl"
    rows = [
        {"prompt": p.prompt, "completion": write_solution(p, TEACHER, rng)}
        for p in make_problems(16, 0, held_out=False)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def warmstart(out: Path, data: Path, *more: str) -> int:
    return main([*RECIPE, "--data", str(data), "--output_dir", str(out), *FEW, *more])


def accuracy(folder: Path, problems: int = 200) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return greedy_accuracy(model, AutoTokenizer.from_pretrained(folder), make_problems(problems, 1, held_out=True))


def test_the_model_is_one_that_topd_train_takes(solutions, tmp_path, capsys):
    out = tmp_path / "warm"
    assert warmstart(out, solutions) == 0
    assert f"--student {out}" in capsys.readouterr().out
    assert main(["train", "--config", "recipe:embedded", "--model_name_or_path", str(out), "--output_dir",
                 str(tmp_path / "topd"), "--max_steps", "1", "--per_device_train_batch_size", "4",
                 "--max_completion_length", "24", "--window_length", "4"]) == 0  # fmt: skip
    assert (tmp_path / "topd" / "model.safetensors").is_file()


def test_it_speaks_as_topd_train_does(solutions, tmp_path, capsys):
    """A line a log and tables at the end: no dictionaries of the libraries, no audit, which it does not have."""
    out = tmp_path / "my run"
    assert warmstart(out, solutions, "--save_strategy", "steps", "--save_steps", "2") == 0
    said = capsys.readouterr().out
    loading, header, lines = said.splitlines()[:2], said.splitlines()[2:7], said.splitlines()[7:]
    assert loading[0].startswith("Loading embedded:student")
    assert [line.split()[0] for line in header] == ["student", "teacher", "data", "batch", "computed"]
    assert lines[0] == "2 steps; one line every 1."
    number = r" +\d+\.\d{4}"
    assert re.match(rf"1/2  loss{number}  forward KL{number}  cross-entropy{number}  lr \S+  .* left$", lines[1])
    assert re.search(rf"cross-entropy, nats{number}{number}{number}", said)
    assert lines[-3:] == [
        f"Model: {out}", f"Checkpoints: {out}/checkpoint-N, after steps 2",
        f"Next: topd train --student '{out}'",
    ]  # fmt: skip
    assert not {"{", "}", "Audit", "report"} & set(re.findall(r"[{}]|\w+", said))


def test_it_goes_on_from_a_checkpoint_to_the_same_weights(solutions, tmp_path):
    more = ["--save_strategy", "steps", "--save_steps", "1"]
    assert warmstart(tmp_path / "whole", solutions, *more) == 0
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "cut" / "checkpoint-1")
    assert warmstart(tmp_path / "cut", solutions, *more, "--resume_from_checkpoint", "true") == 0
    whole, cut = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut")
    )  # fmt: skip
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_lora_adapter_is_merged_into_the_saved_model(solutions, tmp_path):
    out = tmp_path / "warm"
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--learning_rate", "0.01"]
    assert warmstart(out, solutions, *lora) == 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(pair_folder("student-standard"))
    assert merged.state_dict().keys() == start.state_dict().keys()
    moved = {n for n, value in merged.state_dict().items() if not torch.equal(value, start.state_dict()[n])}
    assert moved
    assert all("proj" in name for name in moved)


def test_messages_and_options_of_the_chat_template_reach_the_tokens(solutions, tmp_path):
    data = tmp_path / "talk.jsonl"
    rows = [json.loads(line) for line in solutions.read_text().splitlines()]
    talk = [{"prompt": [{"role": "user", "content": r["prompt"]}], "completion": r["completion"]} for r in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in talk))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking is false %} then {% endif %}" + tokenizer.chat_template
    config = WarmStartConfig(
        str(tmp_path), kd_ratio=0, chat_template_kwargs={"enable_thinking": False}, use_cpu=True, bf16=False
    )
    prepared = WarmStartTrainer(
        tiny_model(0), args=config, train_dataset=training_rows(str(data), SolutionArguments()),
        processing_class=tokenizer,
    ).train_dataset[0]  # fmt: skip
    assert tokenizer.decode(prepared["input_ids"]) == f" then {rows[0]['prompt']}{rows[0]['completion']}<eos>"
    learned = [token for token in prepared["labels"] if token != -100]
    assert tokenizer.decode(learned) == rows[0]["completion"] + "<eos>"


def test_mistakes_end_in_a_message(solutions, tmp_path, capsys):
    def message(*arguments: str) -> str:
        assert main([*RECIPE, "--output_dir", str(tmp_path), *arguments]) == 2
        return capsys.readouterr().err

    assert "no such file" in message("--data", "nothing.jsonl")
    assert "--kd_ratio" in message("--kd_ration", "0.5")
    assert "must be in [0, 1]" in message("--data", str(solutions), "--kd_ratio", "2")
    assert "embedded model 'nobody'" in message(
        "--data", str(solutions), "--teacher_model_name_or_path", "embedded:nobody"
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert "line 2" in message("--data", str(broken))
    assert main(["warmstart", "--output_dir", str(tmp_path), "--use_cpu", "true"]) == 2
    assert "Specify the student, the teacher and the solutions" in capsys.readouterr().err


@pytest.mark.slow
def test_both_stages_raise_the_accuracy(tmp_path):
    """The pipeline of docs/warmstart.md: the teacher's solutions, the warm start, TOPD."""
    data, warm, topd = tmp_path / "solutions.jsonl", tmp_path / "warm", tmp_path / "topd"
    assert main(["generate", "--teacher", "embedded:teacher", "--data", "embedded", "--limit", "512", "--batch", "128",
                 "--filter", "embedded", "--out", str(data)]) == 0  # fmt: skip
    assert main([*RECIPE, "--data", str(data), "--output_dir", str(warm)]) == 0
    assert main(["train", "--config", "recipe:embedded", "--model_name_or_path", str(warm), "--output_dir",
                 str(topd)]) == 0  # fmt: skip
    before, between, after = accuracy(pair_folder("student-standard")), accuracy(warm), accuracy(topd)
    assert between > before + 0.10
    assert after > between + 0.05
