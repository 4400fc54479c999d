"""Data as people have it: other columns, chat forms, several files, mixtures and streams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from topd.cli.main import main
from topd.cli.train import load, parse
from topd.errors import DataError, TOPDError
from topd.loading.data import load_prompts, source_name, stream_prompts
from topd.loading.rows import DataForm, read_teacher_prompt

ASK = [{"role": "user", "content": "What is 2+3?"}]
SYSTEM = {"role": "system", "content": "Answer briefly."}
SHARE = {"conversations": [{"from": "human", "value": "What is 2+3?"}, {"from": "gpt", "value": "5"}]}
MESSAGES = {"messages": [*ASK, {"role": "assistant", "content": "5"}]}
PARTS = {
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+3?"}]}]
}
FORMS: dict[str, tuple[dict[str, Any], DataForm, Any]] = {
    "messages": (MESSAGES, DataForm(), ASK),
    "ShareGPT": (SHARE, DataForm(), ASK),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "Answer briefly."}, *SHARE["conversations"]]}, DataForm(),
        [SYSTEM, *ASK],
    ),
    "parts": (PARTS, DataForm(), ASK),
    "another column": ({"instruction": "What is 2+3?", "prompt": "other"}, DataForm("instruction"), "What is 2+3?"),
    "a system prompt before messages": (MESSAGES, DataForm(system="Answer briefly."), [SYSTEM, *ASK]),
    "a system prompt before text": ({"problem": "What is 2+3?"}, DataForm(system="Answer briefly."), [SYSTEM, *ASK]),
    "a system prompt in a column": (
        SHARE | {"system": "Answer briefly.", "tools": ""}, DataForm(system="Another."), [SYSTEM, *ASK],
    ),
    "a row's own system prompt": (
        {"messages": [{"role": "system", "content": "Mine."}, *ASK]}, DataForm(system="Answer briefly."),
        [{"role": "system", "content": "Mine."}, *ASK],
    ),
}  # fmt: skip


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_a_prompt(tmp_path: Path, name: str) -> None:
    row, form, expected = FORMS[name]
    source = write(tmp_path / "a.jsonl", row | {"answer": 5}, row | {"answer": 6})
    data = load_prompts(source, form=form)
    assert data["prompt"][:] == [expected] * 2
    assert data["answer"][:] == ["5", "6"]
    assert [row["prompt"] for row in stream_prompts(source, form=form)] == [expected] * 2


def test_a_conversation_s_last_answer_is_the_response(tmp_path: Path) -> None:
    data = load_prompts(write(tmp_path / "a.jsonl", MESSAGES, {"messages": SHARE["conversations"]}), responses=True)
    assert data.to_list() == [{"prompt": ASK, "response": "5"}] * 2


BROKEN = [
    ({"messages": [{"role": "assistant", "content": "5"}]}, "line 2: `messages` has only the assistant's answer"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "line 2: message 1 of `conversations` has the role 'alien'"),
    ({"conversations": [{"from": "human", "value": " "}]}, "line 2: message 1 of `conversations` is blank"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 of `messages` has a part of type 'im",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 of `messages` has the part {'type'"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1 of `messages` has the part 'x'"),
    ({"messages": json.dumps(ASK)}, "line 2: `messages` is a list of messages written as text; write it as a list"),
    ({"conversations": str(SHARE["conversations"])}, "line 2: `conversations` is a list of messages written as text"),
    (SHARE | {"tools": [{"name": "f"}]}, "line 2: `tools` is given, and tools are not supported"),
    (SHARE | {"system": 3}, "line 2: `system` is 3; write text"),
    ({"messages": []}, "line 2: `messages` is []; write text or a list of messages"),
    ({"text": "x"}, "line 2: no `prompt`, `problem`, `question`, `messages`, `conversations` in ['text']"),
]


@pytest.mark.parametrize(("row", "problem"), BROKEN, ids=[problem for _, problem in BROKEN])
def test_broken_rows_name_file_line_and_column(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    good = MESSAGES if "messages" in row else SHARE
    source = write(tmp_path / "a.jsonl", good, row)
    with pytest.raises(DataError) as refusal:
        load_prompts(source)
    assert f"{source!r}: broken rows: 1" in str(refusal.value)
    assert problem in str(refusal.value)
    with pytest.raises(DataError) as refusal:
        list(stream_prompts(source))
    assert f"{source!r}: line 2: " in str(refusal.value)
    assert problem in str(refusal.value)


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: no column `instruction` in \['messages'\]"):
        load_prompts(write(tmp_path / "a.jsonl", MESSAGES), form=DataForm("instruction"))


# Several sources


def texts(*numbers: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{number}"} for number in numbers]


def test_several_files_and_patterns_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "part-2.jsonl", *texts(3))
    write(tmp_path / "part-1.jsonl", *texts(1, 2))
    (tmp_path / "other.csv").write_text("question,answer\np4,7\n")
    assert load_prompts("part-*.jsonl")["prompt"][:] == ["p1", "p2", "p3"]
    both = load_prompts(["other.csv", "part-*.jsonl"])
    assert both.to_list()[:2] == [{"prompt": "p4", "answer": "7"}, {"prompt": "p1", "answer": None}]
    assert load_prompts(["other.csv", "part-*.jsonl"], limit=2)["prompt"][:] == ["p4", "p1"]
    assert [row["prompt"] for row in stream_prompts(["other.csv", "part-*.jsonl"])] == ["p4", "p1", "p2", "p3"]
    with pytest.raises(DataError, match=r"'none-\*.jsonl': no file fits this pattern"):
        load_prompts("none-*.jsonl")
    with pytest.raises(DataError, match=r"'gone.jsonl': There is no such file"):
        load_prompts(["other.csv", "gone.jsonl"])
    with pytest.raises(DataError, match="no data source is given"):
        load_prompts([])
    write(tmp_path / "chat.jsonl", MESSAGES)
    with pytest.raises(DataError, match=r"'other.csv' has text and 'chat.jsonl' conversations; use one kind"):
        load_prompts(["other.csv", "chat.jsonl"])


@pytest.mark.parametrize("load", [load_prompts, stream_prompts])
def test_a_mixture_draws_by_weight_until_one_source_runs_out(tmp_path: Path, load: Any) -> None:
    a = write(tmp_path / "a.jsonl", *texts(*range(700)))
    b = write(tmp_path / "b.jsonl", *texts(*range(1000, 2000)))
    found = [row["prompt"] for row in load({a: 7, b: 3})]
    of_a = [prompt for prompt in found if int(prompt[1:]) < 1000]
    assert len(set(found)) == len(found)
    assert of_a == [row["prompt"] for row in texts(*range(700))]  # the one that ran out, in its order
    assert len(of_a) / len(found) == pytest.approx(0.7, abs=0.03)
    assert found == [row["prompt"] for row in load({a: 0.7, b: 0.3})]
    assert 0 < sum(int(prompt[1:]) >= 1000 for prompt in found[:50]) < 30  # mixed from the start
    for weight in (0, -1, True, "much", float("nan")):
        with pytest.raises(DataError, match="weights must be positive numbers"):
            load({a: 1, b: weight})
    assert source_name({a: 0.7, b: 0.3}) == f"0.7 {a} + 0.3 {b}"


def test_folders_that_load_dataset_reads(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", {"question": "p1"}, {"question": "p2"})
    write(folder / "test.jsonl", {"question": "p3"})
    assert load_prompts(str(folder))["prompt"][:] == ["p1", "p2"]
    assert load_prompts(str(folder), split="test")["prompt"][:] == ["p3"]
    assert [row["prompt"] for row in stream_prompts(str(folder), split="test")] == ["p3"]
    configs = "".join(f"- config_name: {n}\n  data_files: {f}.jsonl\n" for n, f in (("one", "train"), ("two", "test")))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load_prompts(str(folder), form=DataForm(config="two"))["prompt"][:] == ["p3"]
    with pytest.raises(DataError, match=r"Please pick one among the available configs: \['one', 'two'\]"):
        load_prompts(str(folder))


def test_a_stream_is_not_held_in_memory(tmp_path: Path) -> None:
    """Broken rows are met where they are, and rows after those that are needed are not read."""
    source = write(tmp_path / "a.jsonl", *texts(*range(50)), {"prompt": ""})
    stream = stream_prompts(source)
    assert isinstance(stream, datasets.IterableDataset)
    assert stream.column_names == ["prompt", "answer"]
    assert [row["prompt"] for row in stream.take(20)] == [row["prompt"] for row in texts(*range(20))]
    assert len(list(stream_prompts(source, limit=5))) == 5
    with pytest.raises(DataError, match=r"a.jsonl': line 51: the prompt is empty"):
        list(stream)


# In the commands


def train(out: Path, *words: str) -> list[str]:
    return [
        *("train", "--student", "embedded:student-standard", "--teacher", "embedded:teacher", "--output_dir", str(out)),
        *("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"),
        *("--per_device_train_batch_size", "2", "--max_completion_length", "12", "--window_length", "4", *words),
    ]


def test_a_streamed_run_trains_and_resumes_as_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", *({"messages": [{"role": "user", "content": f"what is {n}+3?"}]} for n in range(9)))
    b = write(tmp_path / "b.jsonl", *({"conversations": SHARE["conversations"]} for n in range(9)))
    words = ["--streaming", "true", "--data", json.dumps({a: 0.7, b: 0.3}), "--save_steps", "2"]
    assert main(train(tmp_path / "none", *words)) == 2
    assert "data_streaming needs max_steps" in capsys.readouterr().err
    assert main(train(tmp_path / "whole", *words, "--max_steps", "3")) == 0
    assert main(train(tmp_path / "parts", *words, "--max_steps", "3")) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoint-3")
    assert main(train(tmp_path / "parts", *words, "--max_steps", "3", "--resume_from_checkpoint", "true")) == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_options_of_trl_and_of_a_form_reach_the_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "test.jsonl", {"instruction": "what is 2+3?"})
    words = ["--dataset_name", str(folder), "--dataset_train_split", "test", "--prompt-column", "instruction"]
    data, config, _ = parse(train(tmp_path, *words, "--system-prompt", "Answer briefly.")[1:])
    assert load(data, config)["prompt"][:] == [[SYSTEM, {"role": "user", "content": "what is 2+3?"}]]
    several, _, _ = parse(train(tmp_path, "--data", "a.jsonl", "b.jsonl")[1:])
    assert several.data == ["a.jsonl", "b.jsonl"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {a.jsonl: 0.7, b.jsonl: 0.3}\nsystem_prompt: Be brief.\n")
    mixed, _, _ = parse(train(tmp_path, "--config", str(recipe))[1:])
    assert (mixed.data, mixed.system_prompt) == ({"a.jsonl": 0.7, "b.jsonl": 0.3}, "Be brief.")
    with pytest.raises(TOPDError, match="write a JSON object of sources and weights"):
        parse(train(tmp_path, "--data", "{a: 1")[1:])
    embedded, _, _ = parse(train(tmp_path, "--data", "embedded", "--system-prompt", "Be brief.")[1:])
    with pytest.raises(TOPDError, match="The embedded task has no system prompt"):
        load(embedded, config)


def test_the_other_commands_read_the_same_forms(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"chat": [*ASK, {"role": "assistant", "content": " 5"}], "answer": 5})
    form = ["--data", source, "--prompt-column", "chat"]
    assert main(["check", "--quick", *train(tmp_path, "--data", source)[1:]]) == 2  # no column that it knows
    write(tmp_path / "a.jsonl", *[{"chat": ASK, "answer": 5}] * 4)
    assert main(["check", "--quick", *train(tmp_path, *form)[1:]]) == 0
    few = ["--rollouts", "2", "--batch", "2", "--max-new-tokens", "12", "--window-length", "4"]
    pair = ["--student", "embedded:student-standard", "--teacher", "embedded:teacher"]
    assert main(["probe", *pair, *form, *few, "--out", str(tmp_path / "probe")]) == 0
    out = tmp_path / "solutions.jsonl"
    words = ["--limit", "2", "--max-new-tokens", "8", "--out", str(out)]
    assert main(["generate", "--teacher", "embedded:teacher", *form, *words]) == 0
    assert json.loads(out.read_text().splitlines()[0])["prompt"] == ASK


def test_a_stream_whose_first_row_has_no_teacher_prompt_does_not_drop_those_of_others(tmp_path: Path) -> None:
    also = {"teacher_prompt": read_teacher_prompt}
    source = write(tmp_path / "a.jsonl", {"prompt": "p1", "teacher_prompt": None}, {"prompt": "p2"})
    assert list(stream_prompts(source, also=also)) == [{"prompt": f"p{i}", "answer": None} for i in (1, 2)]
    write(tmp_path / "a.jsonl", {"prompt": "p1", "teacher_prompt": None}, {"prompt": "p2", "teacher_prompt": "t2"})
    with pytest.raises(DataError, match="line 2: the teacher_prompt is given, but not in the first row"):
        list(stream_prompts(source, also=also))
