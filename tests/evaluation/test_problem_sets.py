"""Problem sets: the known ones, files of the user, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from topd.embedded.task import make_problems
from topd.errors import TOPDError
from topd.evaluation import benchmarks
from topd.evaluation.benchmarks import BENCHMARKS, load_benchmark


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_problems_gets_the_instruction(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.jsonl", [{"problem": "What is {1}+1?", "answer": 2}, {"problem": "2+2?", "answer": "4"}]
    )
    found = load_benchmark(file)
    assert (found.name, found.rule, found.max_new_tokens) == ("mine", "math", 16384)
    assert found.problems[0].prompt == (
        "What is {1}+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert [problem.answer for problem in found.problems] == ["2", "4"]
    assert load_benchmark(file, limit=1).problems == found.problems[:1]
    assert load_benchmark(file, rule="integer").rule == "integer"
    assert load_benchmark(f"two={file}").name == "two"
    assert load_benchmark(str(Path(file).rename(tmp_path / ".mine.jsonl"))).name == "mine"


def test_an_instruction_that_is_there_is_not_repeated(tmp_path: Path) -> None:
    asked = "1+1? Write \\boxed{} around it."
    assert load_benchmark(write(tmp_path / "m.jsonl", [{"prompt": asked, "answer": "2"}])).problems[0].prompt == asked
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?"}]
    assert load_benchmark(write(tmp_path / "t.jsonl", [{"prompt": talk, "answer": "2"}])).problems[0].prompt == talk


def test_a_known_benchmark_from_a_file_keeps_its_rule(tmp_path: Path) -> None:
    file = write(tmp_path / "any.jsonl", [{"problem": "1+1?", "answer": "2"}])
    found = load_benchmark(f"aime24={file}")
    assert (found.name, found.rule) == ("aime24", "integer")


def test_worked_answers_of_gsm8k_end_in_the_number(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "He has 3*400=1200.\n#### 1,200"}]
    assert load_benchmark("gsm8k=" + write(tmp_path / "g.jsonl", rows)).problems[0].answer == "1200"


@pytest.mark.parametrize("name", [name for name, known in BENCHMARKS.items() if known.source])
def test_known_benchmarks_are_asked_of_the_hub_as_the_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def hub(source: str, *, split: str) -> Dataset:
        asked.append((source, split))
        return Dataset.from_list([{"prompt": f"{i}?", "answer": "7"} for i in range(BENCHMARKS[name].size)])

    monkeypatch.setattr(benchmarks, "load_prompts", hub)
    found = load_benchmark(name)
    assert asked == [(BENCHMARKS[name].source, BENCHMARKS[name].split)]
    assert len(found.problems) == len({problem.id for problem in found.problems}) == BENCHMARKS[name].size


def test_a_dataset_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{"prompt": "1?", "answer": "1"}] * 29)
    monkeypatch.setattr(benchmarks, "load_prompts", lambda *_, **__: rows)
    with pytest.raises(TOPDError, match=r"has 29 problems where aime24 has 30.*--benchmark aime24=FILE"):
        load_benchmark("aime24")


def test_the_embedded_task_is_held_out() -> None:
    found = load_benchmark("embedded", limit=50)
    trained = {problem.prompt for problem in make_problems(4096, 0, held_out=False)}
    assert len(found.problems) == 50
    assert not trained & {problem.prompt for problem in found.problems}
    assert load_benchmark("embedded", limit=20).problems == found.problems[:20]


def test_ids_change_with_the_problem(tmp_path: Path) -> None:
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]
    before = load_benchmark(write(tmp_path / "m.jsonl", rows))
    rows[1]["answer"] = "5"
    after = load_benchmark(write(tmp_path / "m.jsonl", rows))
    assert before.problems[0].id == after.problems[0].id
    assert before.problems[1].id != after.problems[1].id


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("aime2", r"Known benchmarks are aime24.*--benchmark NAME=FILE"),
        ("aime24", "Without a network"),
        ("runs/lr=1/nowhere.jsonl", "no such file"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(name: str, says: str) -> None:
    with pytest.raises(TOPDError, match=says):
        load_benchmark(name)


def test_answers_that_the_rule_never_accepts_are_refused(tmp_path):
    rows = [{"problem": "a", "answer": "1,200"}, {"problem": "b", "answer": "x + 1"}]
    file = write(tmp_path / "mine.jsonl", rows)
    for rule in ("integer", "gsm8k"):
        with pytest.raises(TOPDError, match=f"rule {rule} cannot read 1 of 2 answers .*'x \\+ 1' of number 2"):
            load_benchmark(file, rule=rule)
    assert len(load_benchmark(file).problems) == 2


def test_problems_without_answers_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.jsonl", [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?"}])
    with pytest.raises(TOPDError, match="1 of 2 problems have no `answer`, the first is number 2"):
        load_benchmark(file)


def test_the_harness_s_prompt_asks_for_no_box_and_compares_strings(tmp_path: Path) -> None:
    instructed = "1+1?" + benchmarks.INSTRUCTION  # as some files have it
    rows = [{"problem": instructed, "answer": "02"}, {"problem": "2+2?", "answer": r"\frac{8}{2}"}]
    file = write(tmp_path / "any.jsonl", rows)
    found = load_benchmark(f"aime24={file}", style="lm-eval")
    assert (found.name, found.rule) == ("aime24", "lm_eval")
    assert [problem.prompt for problem in found.problems] == ["Question: 1+1?\nAnswer:", "Question: 2+2?\nAnswer:"]
    assert [problem.answer for problem in found.problems] == ["2", r"\frac{8}{2}"]
    assert load_benchmark(f"aime24={file}", limit=1).problems[0].prompt == instructed


def test_the_harness_s_prompt_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    asked = write(tmp_path / "a.jsonl", [{"problem": "1+1? Write \\boxed{} around it.", "answer": "2"}])
    talk = write(tmp_path / "t.jsonl", [{"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}])
    for file in (asked, talk):
        with pytest.raises(TOPDError, match="without an instruction of their own"):
            load_benchmark(f"hmmt25={file}", style="lm-eval")
    for name in ("math500", "embedded", asked):
        with pytest.raises(TOPDError, match="is for aime24, aime25, hmmt25, not for"):
            load_benchmark(name, style="lm-eval")
