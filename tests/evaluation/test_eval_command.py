"""`topd eval`: the command, its files, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_openai import fake_server

from topd.cli.main import main
from topd.errors import install
from topd.evaluation.answers import verdict
from topd.evaluation.compare import COMPARISON
from topd.evaluation.results import RESULT, write_result

STUDENT, TEACHER = "student=embedded:student-standard", "teacher=embedded:teacher"
ARGUMENTS = ["eval", "--limit", "12", "--samples", "3", "--batch", "36", "--temperature", "1"]


def run(out: Path, *more: str) -> int:
    benchmark = [] if "--benchmark" in more or "--compare" in more else ["--benchmark", "embedded"]
    return main([*ARGUMENTS, *benchmark, "--out", str(out), *more])


def records(out: Path, model: str = "student", benchmark: str = "embedded") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / model / f"{benchmark}.samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    assert run(out, "--model", STUDENT, TEACHER) == 0
    return out


def test_every_sample_is_a_line_that_can_be_judged_again(evaluated: Path) -> None:
    found = records(evaluated)
    assert len({(record["problem"], record["sample"]) for record in found}) == len(found) == 36
    result = json.loads((evaluated / "student" / RESULT).read_text())["benchmarks"]["embedded"]
    answers = {problem["id"]: problem["answer"] for problem in result["by_problem"]}
    for record in found:
        again = verdict(record["text"], answers[record["problem"]], "embedded")
        assert (record["extracted"], record["right"], record["parsed"]) == (again.extracted, again.right, again.parsed)
        assert record["tokens"] <= 96


def test_the_result_is_computed_from_the_records(evaluated: Path) -> None:
    result = json.loads((evaluated / "student" / RESULT).read_text())
    assert write_result(evaluated / "student") == result
    found, told = records(evaluated), result["benchmarks"]["embedded"]
    assert (told["problems"], told["samples"]) == (12, 3)
    assert told["accuracy"]["mean"] == pytest.approx(sum(record["right"] for record in found) / 36)
    assert told["accuracy"]["low"] < told["accuracy"]["mean"] < told["accuracy"]["high"]
    assert told["unparsed"] == sum(not record["parsed"] for record in found)
    assert told["wrong"] + told["unparsed"] + sum(record["right"] for record in found) == 36
    solved = {record["problem"] for record in found if record["right"]}
    assert told["pass_at"]["3"]["mean"] == pytest.approx(len(solved) / 12)
    assert [problem["right"] for problem in told["by_problem"]] == [
        sum(record["right"] for record in found if record["problem"] == problem["id"]) for problem in told["by_problem"]
    ]
    assert told["settings"]["temperature"] == 1.0
    assert {"torch", "transformers", "topd"} <= result["benchmarks"]["embedded"]["settings"]["versions"].keys()


def test_two_models_are_compared_at_once(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = json.loads((evaluated / COMPARISON).read_text())
    assert list(comparison["models"]) == ["student", "teacher"]
    (row,) = comparison["comparisons"]
    by_hand = [sum(r["right"] for r in records(evaluated, model)) / 36 for model in ("teacher", "student")]
    assert row["mean"] == pytest.approx(by_hand[0] - by_hand[1])
    assert row["low"] <= row["mean"] <= row["high"]
    assert row["power"]["gain"] == pytest.approx(0.044)
    folders = [str(evaluated / model) for model in ("student", "teacher")]
    assert main(["eval", "--compare", *folders, "--out", str(tmp_path)]) == 0  # the same without a model
    assert json.loads((tmp_path / COMPARISON).read_text()) == comparison
    assert "teacher" in capsys.readouterr().out


def test_a_second_run_samples_nothing_and_more_samples_are_added(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--model", STUDENT, "--samples", "2") == 0
    assert run(tmp_path, "--model", STUDENT) == 0
    assert "24 of 36 are done" in capsys.readouterr().out
    assert sorted(map(str, records(tmp_path))) == sorted(map(str, records(evaluated)))
    before = (tmp_path / "student" / "embedded.samples.jsonl").read_bytes()
    assert run(tmp_path, "--model", STUDENT, "--samples", "1") == 0
    assert (tmp_path / "student" / "embedded.samples.jsonl").read_bytes() == before


def test_responses_do_not_depend_on_the_batch(evaluated: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--model", STUDENT, "--batch", "20") == 0
    assert records(tmp_path) == records(evaluated)


def test_killed_and_started_again_it_ends_the_same(evaluated: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, a torn last line, then the same command."""
    file = tmp_path / "student" / "embedded.samples.jsonl"
    command = [sys.executable, "-m", "topd.cli", *ARGUMENTS, "--benchmark", "embedded", "--out", str(tmp_path),
               "--model", STUDENT, "--batch", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while (not file.exists() or file.read_bytes().count(b"\n") < 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes().count(b"\n")
    assert 10 <= kept < 36
    with file.open("a") as lines:
        lines.write('{"problem": "0003')
    assert not (tmp_path / "student" / RESULT).exists()
    assert run(tmp_path, "--model", STUDENT) == 0
    assert records(tmp_path) == records(evaluated)


def test_a_broken_line_in_the_middle_costs_its_own_sample_only(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated / "student", tmp_path / "student")
    file = tmp_path / "student" / "embedded.samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    broken = next(at for at, line in enumerate(lines) if json.loads(line)["sample"] == 2)
    file.write_text("".join([*lines[:broken], lines[broken][:20] + "\n", *lines[broken + 1 :]]))
    assert write_result(tmp_path / "student")["benchmarks"]["embedded"]["samples"] == 2  # all that each problem has
    assert run(tmp_path, "--model", STUDENT) == 0
    assert "35 of 36 are done" in capsys.readouterr().out
    assert file.read_text().splitlines(keepends=True) == [*lines[:broken], *lines[broken + 1 :], lines[broken]]


@pytest.mark.parametrize(
    ("more", "setting"),
    [(["--temperature", "0.5"], "temperature"), (["--limit", "6"], "problems"), (["--seed", "1"], "seed")],
)
def test_other_settings_do_not_mix(
    more: list[str], setting: str, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = records(evaluated)
    assert run(evaluated, "--model", STUDENT, *more) == 2
    error = capsys.readouterr().err
    assert f"other settings ({setting})" in error
    assert "another --out" in error
    assert records(evaluated) == before


def test_another_model_under_the_same_name_does_not_mix(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluated, "--model", "student=embedded:student-easy") == 2
    assert "other settings (fingerprint, model)" in capsys.readouterr().err


def test_benchmarks_of_different_models_do_not_get_one_name(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated / "student", tmp_path / "student")
    long = ["--benchmark", "embedded-long", "--limit", "1", "--samples", "1"]
    assert run(tmp_path, "--model", "student=embedded:student-easy", *long) == 2
    assert "embedded was answered by another model" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "student" / "embedded-long.samples.jsonl").exists()


def test_cut_and_unread_responses_are_counted_apart(tmp_path: Path) -> None:
    assert run(tmp_path, "--model", STUDENT, "--max-new-tokens", "12") == 0
    told = json.loads((tmp_path / "student" / RESULT).read_text())["benchmarks"]["embedded"]
    assert (told["truncated"], told["unparsed"], told["truncated_and_unparsed"], told["wrong"]) == (36, 36, 36, 0)


def test_a_server_gives_the_same_records_and_what_it_gave_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server echoes its prompt, which here holds a box; its fifth answer is an error."""
    rows = [{"problem": f"Write \\boxed{{{n}}} and stop.", "answer": str(2 * (n // 2))} for n in range(6)]
    (tmp_path / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "eval", "--model", "echo=the-teacher", "--benchmark", str(tmp_path / "echo.jsonl"), "--samples", "2",
        "--out", str(tmp_path), "--concurrency", "1",
    ]  # fmt: skip
    with fake_server(lambda n: 400 if n == 5 else None) as server:
        assert main([*command, "--server", server.url]) == 2
        assert "run the same command again to resume" in " ".join(capsys.readouterr().err.split())
        kept = records(tmp_path, "echo", "echo")
        assert 4 <= len(kept) == len(server.seen) - 1
        assert main([*command, "--server", server.url]) == 0
        assert len(server.seen) == 12 + 1
    assert records(tmp_path, "echo", "echo")[: len(kept)] == kept
    assert {seen["path"] for seen in server.seen} == {"/v1/chat/completions"}
    told = json.loads((tmp_path / "echo" / RESULT).read_text())["benchmarks"]["echo"]
    assert [problem["right"] for problem in told["by_problem"]] == [2, 0, 2, 0, 2, 0]
    assert told["settings"]["engine"] == "server"


def test_the_harness_s_prompt_and_rule_are_recorded_and_do_not_mix_with_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "aime.jsonl").write_text(json.dumps({"problem": "What is $1+1$?", "answer": "2"}) + "\n")
    command = [
        "eval", "--model", "echo=the-teacher", "--benchmark", f"aime24={tmp_path / 'aime.jsonl'}", "--samples", "1",
        "--out", str(tmp_path),
    ]  # fmt: skip
    with fake_server(lambda n: None) as server:
        assert main([*command, "--server", server.url, "--prompt-style", "lm-eval"]) == 0
        assert server.seen[0]["messages"] == [{"role": "user", "content": "Question: What is $1+1$?\nAnswer:"}]
        assert main([*command, "--server", server.url]) == 2
    assert "other settings (problems, rule)" in capsys.readouterr().err
    told = json.loads((tmp_path / "echo" / RESULT).read_text())["benchmarks"]["aime24"]
    assert told["settings"]["rule"] == "lm_eval"
    assert told["unparsed"] == 1  # the server echoes the prompt, and generation ends at "Question:"


def test_without_math_verify_nothing_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    (tmp_path / "mine.jsonl").write_text('{"problem": "what is 1+1?", "answer": "2"}\n')
    assert run(tmp_path, "--model", STUDENT, "--benchmark", str(tmp_path / "mine.jsonl"), "--max-new-tokens", "9") == 2
    assert f"{install('eval')}." in capsys.readouterr().err
    assert not (tmp_path / "student" / "mine.samples.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--temperature", "0"], "give --samples 1"),
        (["--top-p", "0"], "--top-p must be in"),
        (["--max-new-tokens", "4000"], "lower --max-new-tokens to at most"),
        (["--model", "a=embedded:teacher", "a=embedded:student-easy"], "have the same label"),
        (["--model", "nowhere/at/all"], "Cannot load the tokenizer"),
        (["--benchmark", "aime2"], "Known benchmarks are"),
        (["--compare", "nowhere"], "contains no evaluation"),
        (["--compare", "nowhere", "--model", "x"], "leave --model and --benchmark out"),
        (["--engine", "vllm"], install("vllm")),
    ],
)
def test_mistakes_end_in_a_message(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *more) == 2
    assert says in " ".join(capsys.readouterr().err.split())
