"""`topd generate`: its files, going on after an interruption, and what it leaves out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from fake_openai import fake_server

from topd.cli.main import main
from topd.embedded.task import is_correct
from topd.warmstart.solutions import clean, load_solutions

COMMAND = ["generate", "--teacher", "embedded:teacher", "--data", "embedded", "--limit", "12", "--batch", "4"]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def generate(out: Path, *more: str) -> int:
    return main([*COMMAND, "--out", str(out), *more])


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "solutions.jsonl"
    assert generate(out) == 0
    return out


def test_a_solution_has_its_prompt_answer_and_whether_it_was_cut(generated):
    found = rows(generated)
    assert len(found) == 12
    assert all(set(row) == {"prompt", "completion", "truncated", "answer"} for row in found)
    assert sum(is_correct(row["completion"], row["answer"]) for row in found) >= 10
    assert not any(row["truncated"] or "<" in row["completion"] for row in found)
    settings = json.loads(generated.with_suffix(".settings.json").read_text())
    assert settings["counts"]["solutions"] == 12
    assert (settings["temperature"], settings["top_p"]) == (0.6, 0.95)  # the paper's


def test_parquet_holds_the_same_and_the_warm_start_reads_both(generated, tmp_path):
    out = tmp_path / "solutions.parquet"
    for name in (".records.jsonl", ".settings.json"):
        out.with_suffix(name).write_bytes(generated.with_suffix(name).read_bytes())
    assert generate(out) == 0
    assert load_dataset("parquet", data_files=str(out), cache_dir=str(tmp_path))["train"].to_list() == rows(generated)
    for file in (out, generated):
        assert load_solutions(str(file)).to_list() == [
            {"prompt": row["prompt"], "completion": row["completion"]} for row in rows(generated)
        ]


def test_an_interrupted_run_goes_on_and_ends_the_same(generated, tmp_path):
    out = tmp_path / "solutions.jsonl"
    lines = generated.with_suffix(".records.jsonl").read_text().splitlines(keepends=True)
    out.with_suffix(".records.jsonl").write_text("".join(lines[:6]) + lines[6][:30])  # a batch and a half, a torn line
    out.with_suffix(".settings.json").write_bytes(generated.with_suffix(".settings.json").read_bytes())
    assert generate(out) == 0
    assert out.read_text() == generated.read_text()


def test_a_second_run_generates_nothing_and_a_shorter_one_loses_nothing(generated, tmp_path, capsys):
    before = generated.with_suffix(".records.jsonl").read_text()
    assert generate(generated) == 0
    assert "12 are done" in " ".join(capsys.readouterr().out.split())
    assert generate(generated, "--limit", "3") == 0
    assert len(rows(generated)) == 3
    assert generate(generated) == 0
    assert generated.with_suffix(".records.jsonl").read_text() == before


def test_other_settings_and_other_prompts_are_refused(generated, tmp_path, capsys):
    assert generate(generated, "--temperature", "0.9") == 2
    assert "other settings (temperature)" in capsys.readouterr().err
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    command = [*COMMAND[:3], "--data", str(data), "--out", str(out), "--max-new-tokens", "4"]
    data.write_text('{"prompt": "what is 1+2?"}\n{"prompt": "what is 3+4?"}\n')
    assert main(command) == 0
    data.write_text('{"prompt": "what is 1+2?"}\n{"prompt": "what is 5+4?"}\n')
    assert main(command) == 2
    assert "to other prompts" in capsys.readouterr().err


def test_samples_of_a_prompt_differ_and_equal_ones_are_left_out(tmp_path):
    out = tmp_path / "solutions.jsonl"
    assert generate(out, "--limit", "4", "--samples", "4", "--temperature", "1") == 0
    found = [(row["prompt"], row["completion"]) for row in rows(out)]
    assert len(set(found)) == len(found) > 4
    assert len(rows(out.with_suffix(".records.jsonl"))) == 16


def test_a_response_that_the_limit_ends_is_marked_and_kept_from_training(tmp_path, capsys):
    out = tmp_path / "solutions.jsonl"
    assert generate(out, "--limit", "4", "--max-new-tokens", "5") == 0
    assert all(row["truncated"] for row in rows(out))
    assert main(["warmstart", "--kd_ratio", "0", "--data", str(out), "--model_name_or_path", "embedded:teacher",
                 "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]) == 2  # fmt: skip
    assert "all 4 solutions are truncated" in capsys.readouterr().err
    assert len(load_solutions(str(out), truncated=True)) == 4


def test_wrong_repeated_and_blank_responses_are_counted_apart():
    def record(prompt, text):
        return {"prompt": prompt, "text": text, "truncated": False}

    right, wrong = " so the answer is 5", " so the answer is 6"
    records = [record("a", right), record("a", right), record("a", wrong), record("b", right), record("c", "  "),
               record("d", " hm"), record("e", "\ud800 so the answer is 5")]  # fmt: skip
    kept, counts = clean(records, ["5"] * 7, "embedded")
    assert [(row["prompt"], row["completion"]) for row in kept] == [("a", right), ("b", right)]
    assert counts == {"solutions": 2, "repeated": 1, "blank": 1, "half a character": 1, "wrong": 1,
                      "without an answer": 1}  # fmt: skip
    everything, _ = clean(records, [None] * 7, None)
    assert len(everything) == 4
    assert all("answer" not in row for row in everything)


@pytest.mark.parametrize("rule", ["gsm8k", "math"])
def test_right_responses_to_problems_of_gsm8k_pass_the_filter(tmp_path, rule):
    data, out = tmp_path / "gsm8k.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps({"question": r"\boxed{1200} #### 1200", "answer": "3*400=1200.\n#### 1,200"}) + "\n")
    with fake_server() as server:
        asked = ["generate", "--teacher", "the-teacher", "--server", server.url, "--data", str(data), "--out", str(out)]
        assert main([*asked, "--filter", rule]) == 0
    assert [row["answer"] for row in rows(out)] == ["1200"]


def test_of_equal_prompts_the_first_counts(tmp_path):
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    given = [("what is 3+2?", "5"), ("what is 4+2?", "6"), ("what is 3+2?", "7")]
    data.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in given))
    assert main([*COMMAND[:3], "--data", str(data), "--out", str(out), "--temperature", "0",
                 "--max-new-tokens", "60"]) == 0  # fmt: skip
    assert [(row["prompt"], row["answer"]) for row in rows(out)] == given[:2]


def test_messages_stay_messages_and_become_trl_s_for_training(tmp_path):
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out.parquet"
    talk = [[{"role": "user", "content": f"what is {a}+2?"}] for a in (3, 4)]
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in talk))
    assert main([*COMMAND[:3], "--data", str(data), "--out", str(out), "--temperature", "0",
                 "--max-new-tokens", "60"]) == 0  # fmt: skip
    loaded = load_solutions(str(out))
    assert loaded["prompt"][:] == talk
    assert loaded["completion"][0][0]["role"] == "assistant"
    assert is_correct(loaded["completion"][0][0]["content"], "5")


def test_a_server_s_responses_are_kept_when_it_fails_and_the_next_run_goes_on(tmp_path, capsys):
    out = tmp_path / "solutions.jsonl"
    with fake_server(lambda n: 400 if n == 9 else None) as server:
        options = ["--teacher", "the-teacher", "--server", server.url, "--concurrency", "2", "--out", str(out)]
        command = ["generate", "--data", "embedded", "--limit", "12", *options]
        assert main(command) == 2
        assert "run the same command again" in capsys.readouterr().err
        assert not out.exists()
        first = len(rows(out.with_suffix(".records.jsonl")))
        assert first >= 8
        assert main(command) == 0
    assert len(server.seen) == 12 + 1
    assert [row["completion"] for row in rows(out)] == [f" echo {row['prompt']}" for row in rows(out)]
    assert len(rows(out)) == 12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "x.csv"], ".jsonl or .parquet"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--samples", "2", "--temperature", "0"], "are the same"),
        (["--top-p", "0"], "--top-p must be in"),
        (["--max-new-tokens", "999"], "lower --max-new-tokens to at most 244"),
        (["--data", "nothing.jsonl"], "There is no such file"),
        (["--teacher", "embedded:nobody"], "no embedded model 'nobody'"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, capsys, more, message):
    assert generate(tmp_path / "x.jsonl", *more) == 2
    assert message in capsys.readouterr().err


def test_a_filter_needs_answers_and_a_broken_line_is_named(tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "what is 1+2?"}\n')
    assert generate(tmp_path / "x.jsonl", "--data", str(data), "--filter", "embedded") == 2
    assert "needs an answer in every row" in capsys.readouterr().err
    data.write_text('{"prompt": "what is 1+2?"}\n{"prompt": \n')
    assert generate(tmp_path / "x.jsonl", "--data", str(data)) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_loses_one_batch_at_most(generated, tmp_path):
    out = tmp_path / "solutions.jsonl"
    records = out.with_suffix(".records.jsonl")
    process = subprocess.Popen(
        [sys.executable, "-m", "topd.cli", *COMMAND, "--limit", "400", "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("\n") >= 8):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = [json.loads(line) for line in records.read_text().splitlines() if line.endswith("}")]
    assert 8 <= len(kept) < 400
    assert not out.exists()
    assert generate(out) == 0  # the first 12
    assert out.read_text() == generated.read_text()
