"""One run of a study: its record, its learning curve."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from check.bad_pairs import other_tokenizer
from small_studies import files_of, plan

from topd.embedded.pair import resolve_model
from topd.errors import NonFiniteError, TokenizerMismatchError, TOPDError
from topd.runs.files import write_json
from topd.study import command
from topd.study.curve import Curve
from topd.study.run import Job, known_record, run_job, scratch_folder, settings_of, what_it_is_made_of
from topd.study.tasks import task_of


def test_a_run_keeps_every_answer_and_is_known_afterwards(tmp_path):
    some = plan(steps=2)
    job = command._final(some, some.arms[1], 0, {"topd": {"guidance_weight": 0.5}}, tmp_path)
    record = run_job(some, job)
    assert len(record["right"]["greedy"]) == len(record["right"]["sampled"]) == 6
    assert [point["step"] for point in record["curve"]] == [0, 1, 2]
    tokens = [point["tokens"] for point in record["curve"]]
    assert tokens[0] == 0 < tokens[1] < tokens[2]
    assert record["seconds_training"] <= record["seconds"]
    assert known_record(some, job) == record
    assert known_record(replace(some, held_out=7), job) is None
    assert known_record(some, replace(job, options={})) is None
    job.file.write_text('{"torn')
    assert known_record(some, job) is None


def test_what_a_killed_run_left_goes_when_it_runs_again(tmp_path):
    job = Job("opd", 0, {}, 1, tmp_path / "runs" / "0.json")
    first = scratch_folder(job)
    (first / "checkpoint").mkdir()
    assert scratch_folder(job) == first
    assert list(first.iterdir()) == []
    assert first.is_relative_to(tmp_path)


def test_the_file_that_a_failed_run_names_is_there(tmp_path):
    some = plan(options={**plan().options, "learning_rate": 1e30})
    with pytest.raises(NonFiniteError) as error:
        run_job(some, command._final(some, some.arms[0], 0, {}, tmp_path))
    named = re.search(r"all in (\S+non_finite\.json)\.", str(error.value))
    assert named, error.value
    assert Path(named[1]).is_file()


def test_what_a_killed_study_left_goes_when_it_starts_again(tmp_path, monkeypatch):
    (tmp_path / "runs" / "opd" / ".0.scratch").mkdir(parents=True)
    (tmp_path / "another" / "runs" / "opd" / ".0.scratch").mkdir(parents=True)  # of a running study
    of_others = {"runs/opd/1.json", "another/runs/opd/.0.scratch/model.safetensors", "film.part"}
    for name in ("runs/opd/.0.scratch/model.safetensors", "study.json.99.part", "runs/opd/0.json.99.part", *of_others):
        (tmp_path / name).write_text("")

    def stop(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "task_of", stop)
    with pytest.raises(KeyboardInterrupt):
        command.run_study(plan(), tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == of_others
    assert not (tmp_path / "runs" / "opd" / ".0.scratch").exists()


def test_tokenizers_that_differ_end_a_run_before_any_weights(tmp_path):
    teacher = other_tokenizer(tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    some = plan(teacher=str(teacher))
    job = command._final(some, some.arms[0], 0, {}, tmp_path)
    with pytest.raises(TokenizerMismatchError, match=r"'7' \(29 and 30\)"):
        run_job(some, job)
    assert not job.file.exists()


def test_a_study_on_own_data_answers_as_on_the_embedded_task(tmp_path):
    embedded = plan(held_out=40)
    own = plan(held_out=40, **files_of(task_of(embedded), tmp_path))
    job = command._final(own, own.arms[0], 0, {}, tmp_path)
    record = run_job(own, job)
    assert len(record["right"]["sampled"]) == 40
    assert [point["step"] for point in record["curve"]] == [0, 1, 2, 3, 4]
    assert known_record(own, job) == record
    assert known_record(embedded, job) is None

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(own.student)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tasks = [task_of(each) for each in (own, embedded)]
    answers = [task.right(model, tokenizer, task.held_out(), sampled=False) for task in tasks]
    assert answers[0] == answers[1]
    assert 0 < sum(answers[0]) < 40


def test_with_lora_runs_train_an_adapter(tmp_path, monkeypatch):
    lora = plan(steps=1, lora={"r": 2, "target_modules": "all-linear"})
    job, trained = command._final(lora, lora.arms[0], 0, {}, tmp_path), []
    add_point = Curve.add_point
    monkeypatch.setattr(Curve, "add_point", lambda *given: [add_point(*given), trained.append(given[2])])
    assert known_record(lora, job) is None
    assert run_job(lora, job)["settings"]["lora"] == lora.lora
    assert {name.split(".")[-3] for name, each in trained[0].named_parameters() if each.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert "lora" not in plan().settings()
    with pytest.raises(TOPDError, match=r"lora: .*'rank'"):
        command.run_study(plan(lora={"rank": 2}), tmp_path)


def test_learning_curves_are_judged_by_the_task(tmp_path):
    class Asked:
        def curve(self):
            return ["a", "b", "c", "d"]

        def right(self, model, tokenizer, problems, *, sampled):
            return [problem == "c" and not sampled for problem in problems]

    curve = Curve(plan(), Asked(), None)
    curve.add_point(SimpleNamespace(global_step=3), None)
    assert curve.points == [{"step": 3, "seconds": 0.0, "accuracy": 0.25}]


def test_a_record_of_other_weights_under_the_same_name_is_not_reused(tmp_path):
    student = tmp_path / "student"
    shutil.copytree(resolve_model("embedded:student-easy"), student)
    some = plan(student=str(student), curve_problems=0, held_out=2)
    job = command._final(some, some.arms[0], 0, {}, tmp_path / "out", steps=1)
    record = run_job(some, job)
    assert known_record(some, job) == record
    with (student / "model.safetensors").open("r+b") as weights:  # as if it was trained again
        weights.seek(-1, 2)
        weights.write(b"\x01")
    assert known_record(some, job) is None
    del record["weights"]  # as written by an earlier version
    job.file.write_text(json.dumps(record))
    assert known_record(some, job) == record


@pytest.mark.parametrize("changed", ["train", "held_out", "tuning"])
def test_a_record_of_other_rows_under_the_same_name_is_not_reused(tmp_path, changed):
    own = plan(**files_of(task_of(plan()), tmp_path))
    job = command._final(own, own.arms[0], 0, {}, tmp_path / "out")
    record = {"settings": settings_of(own, job), **what_it_is_made_of(own)}
    write_json(record, job.file)
    assert known_record(own, job) == json.loads(json.dumps(record))
    file = tmp_path / f"{changed}.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row |= {"prompt": row["prompt"] + " "} if changed == "train" else {"answer": "11"}
    file.write_text("".join([json.dumps(row) + "\n", *others]))
    assert known_record(own, job) is None
    del record["data"]  # as written by an earlier version
    write_json(record, job.file)
    assert known_record(own, job) is not None
