"""What a study trains on and asks: problems, answers, and what is in two places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_studies import files_of, plan

from topd.embedded.pair import resolve_model
from topd.errors import ContextError, TOPDError
from topd.study.tasks import task_of


def test_tuning_problems_are_none_of_the_held_out_ones():
    some = replace(plan(), held_out=300, tune_problems=200)
    task = task_of(some)
    final, tuning = ({problem.prompt for problem in found} for found in (task.held_out(), task.tuning()))
    assert (len(final), len(tuning)) == (300, 200)
    assert not final & tuning


def test_asking_greedily_leaves_the_random_numbers_of_training_alone():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("embedded:student-standard")
    task = task_of(plan())
    before = torch.get_rng_state()
    task.right(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), task.curve(), sampled=False
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_tuning_problems_are_judged_by_the_rule_of_their_own_benchmark(tmp_path):
    files = files_of(task_of(plan()), tmp_path)
    task = task_of(plan(**files | {"tune_benchmark": str(tmp_path / "tuning.jsonl")}))
    rules = [{task.rules[problem.id] for problem in problems} for problems in (task.held_out(), task.tuning())]
    assert rules == [{"embedded"}, {"math"}]


def test_each_seed_has_another_order_of_all_own_prompts(tmp_path):
    task = task_of(plan(**files_of(task_of(plan()), tmp_path)))
    rows = [row["prompt"] for row in task.rows]
    first, second = ([row["prompt"] for row in task.prompts(8, seed)] for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(rows)
    assert len(task.prompts(11, 0)) == 11


@pytest.mark.parametrize(("name", "says"), [("train", "problems of the benchmarks"), ("tuning", "held out too")])
def test_problems_that_are_in_two_places_are_refused(tmp_path, name, says):
    files = files_of(task_of(plan()), tmp_path)
    held_out = (tmp_path / "held_out.jsonl").read_text().splitlines()[0]
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(held_out + "\n")
    with pytest.raises(TOPDError, match=f"1 prompts of .*{says}"):
        task_of(plan(**files | {"data": files["data"]}) if name == "train" else plan(tune_problems=99, **files))


def test_a_benchmark_with_fewer_problems_than_the_tables_would_say_is_refused(tmp_path):
    files = files_of(task_of(plan()), tmp_path)
    with pytest.raises(TOPDError, match="fewer problems than 7: write held_out: 6"):
        task_of(plan(held_out=7, **files))


def test_the_instruction_of_a_benchmark_does_not_hide_a_problem_that_is_trained_on(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": [{"role": "user", "content": "What is 1+1?"}]}\n')
    (tmp_path / "asked.jsonl").write_text('{"problem": "What is 1+1?", "answer": "2"}\n')
    with pytest.raises(TOPDError, match="such as 'What is 1"):
        task_of(plan(data=str(tmp_path / "train.jsonl"), benchmark=str(tmp_path / "asked.jsonl")))


def test_a_response_that_does_not_fit_names_the_studys_own_option(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = task_of(plan(**files_of(task_of(plan()), tmp_path), sampling={"max_new_tokens": 999}))
    folder = resolve_model("embedded:student-standard")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(
        ContextError, match=r"sampling.max_new_tokens 999 .*lower sampling.max_new_tokens to at most 2\d\d"
    ):
        task.right(model, tokenizer, task.held_out(), sampled=True)
