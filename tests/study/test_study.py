"""The study: what it refuses, how it tunes, goes on and compares."""

from __future__ import annotations

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, wilcoxon

from topd.cli import main
from topd.demo.pair import resolve_model
from topd.errors import TOPDError
from topd.study import command
from topd.study.config import plan_of, read_plan
from topd.study.run import Curve, known_record, run_job, settings_of
from topd.study.summary import answers, crossed_interval, sign_flip_p, summarise
from topd.study.tables import study_rows
from topd.study.tasks import task_of

STUDIES = Path(__file__).parents[2] / "studies"


def plan(**other):
    found = {
        "student": "embedded:student-standard", "teacher": "embedded:teacher", "seeds": [0, 1], "steps": 4,
        "held_out": 6, "curve_every": 1, "curve_problems": 4, "tune_problems": 5,
        "options": {"per_device_train_batch_size": 2, "max_completion_length": 12, "window_length": 4},
        "arms": {"opd": {"method": "opd"}, "topd": {"method": "topd"}},
    }  # fmt: skip
    return plan_of(found | other)


# --- the plan --------------------------------------------------------------------------------------------------------


CORE = {"opd", "topd", "own tokens", "teacher's contexts, reverse KL", "opd, topd's time"}


def test_the_study_that_ships_is_whole():
    found = read_plan(STUDIES / "embedded.yaml")
    names = {arm.name for arm in found.arms}
    assert names >= CORE | {
        "low-D_OT capped", "high-D_OT capped", "random capped", "topd, rollout windows", "same index",
        "random candidates", "false alarms", "teacher's contexts, cross-entropy",
    }  # fmt: skip
    assert len(found.seeds) >= 10
    assert found.held_out >= 1000


@pytest.mark.parametrize("student", ["stubborn", "wording"])
def test_the_studies_of_other_students_have_the_core_arms(student):
    found = read_plan(STUDIES / f"embedded-{student}.yaml")
    assert found.student == f"embedded:student-{student}"
    assert {arm.name for arm in found.arms} >= CORE
    assert found.held_out >= 1000


def test_the_study_of_a_real_pair_is_whole():
    found = read_plan(STUDIES / "real-pair.yaml")
    assert (found.benchmark, found.sampling["max_new_tokens"]) == ("math500", 2048)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"arms": {"topd": {}}}, "no arm 'opd'"),
        ({"arms": {"opd": {"learning_rat": 1}}}, "learning_rat is no option"),
        ({"arms": {"opd": {}, "b": {"choices": [{}]}}}, "different numbers of choices"),
        ({"arms": {"opd": {}, "b": {"time_of": "c"}}}, "is no other arm"),
        ({"arms": {"opd": {}, "b": {"time_of": "c"}, "c": {"time_of": "opd"}}}, "no other arm with steps of its own"),
        ({"arms": {"opd": {"time_of": "b"}, "b": {}}}, "has no time_of"),
        ({"arms": {"opd": {}, "b": {"time_of": "opd", "choices": [{}]}}}, "leave out choices"),
        ({"options": None}, "options must be"),
        ({"data": "p.jsonl", "benchmark": "b", "sampling": 0.6}, "sampling must be"),
        ({"arms": {"opd": {"choices": [3]}}}, "list of option mappings"),
        ({"arms": {"opd": [1]}}, "not a mapping"),
        ({"steps": 0}, "steps must be"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": 3}, "different whole numbers"),
        ({"optons": {}}, "unknown: optons"),
        ({"benchmark": "math500"}, "goes with `data`"),
        ({"data": "p.jsonl"}, "needs `benchmark`"),
        ({"data": "p.jsonl", "benchmark": "b", "arms": {"opd": {"choices": [{}]}}}, "`tune_benchmark` must name"),
        ({"data": "p.jsonl", "benchmark": "b", "rule": "maths"}, "rule must be"),
        ({"data": "p.jsonl", "benchmark": "b", "sampling": {"temp": 1}}, "'temp' is unknown"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, says):
    with pytest.raises(ValueError, match=says):
        plan(**other)


@pytest.mark.parametrize("text", ["arms: [", "- 1", ""])
def test_a_broken_file_ends_in_a_message(tmp_path, capsys, text):
    (tmp_path / "s.yaml").write_text(text)
    assert main(["study", "--config", str(tmp_path / "s.yaml")]) == 2
    assert "s.yaml" in capsys.readouterr().err


def test_what_a_study_must_say_is_named():
    with pytest.raises(ValueError, match="missing: seeds, steps, teacher"):
        plan_of({"student": "s", "arms": {"opd": {}}})


# --- the summary -----------------------------------------------------------------------------------------------------


def test_a_summary_by_hand():
    right = {"opd": {0: [1, 0, 0, 0], 1: [1, 1, 0, 0]}, "topd": {0: [1, 1, 0, 0], 1: [1, 1, 1, 0], 2: [0, 0, 0, 0]}}
    found = summarise(right)
    assert found["opd"]["accuracy"]["by_seed"] == [0.25, 0.5]
    beside = found["topd"]["beside_opd"]
    assert (beside["mean"], beside["seeds"], beside["ahead"]) == (0.25, [0, 1], 2)
    assert beside["p"] == 0.5  # two seeds: 2 of 4 sign assignments are as far from 0
    assert "beside_opd" not in found["opd"]


def test_the_sign_test_is_exact():
    assert sign_flip_p(np.array([0.1] * 10)) == pytest.approx(2 / 1024)
    assert sign_flip_p(np.zeros(5)) == 1.0
    ranks = np.array([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])  # on ranks it is Wilcoxon's signed-rank test
    assert sign_flip_p(ranks) == pytest.approx(wilcoxon(ranks, method="exact").pvalue)
    many = np.random.default_rng(0).normal(0.3, 1.0, 40)
    assert sign_flip_p(many) == pytest.approx(wilcoxon(many).pvalue, abs=0.1)


def coverage(studies, seeds, *, of_seeds, of_problems, of_rest, problems=150):
    """How often the interval holds the mean of differences made of a seed's, a problem's and their own part."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(studies):
        parts = [(of_seeds, (seeds, 1)), (of_problems, (1, problems)), (of_rest, (seeds, problems))]
        low, high = crossed_interval(0.2 + sum(rng.normal(0, spread, shape) for spread, shape in parts))
        hits += low <= 0.2 <= high
    return hits / studies


def test_the_interval_covers_the_mean_of_seeds_and_problems():
    assert 0.91 <= coverage(400, 10, of_seeds=0.02, of_problems=0.1, of_rest=0.3) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("of_seeds", "of_problems"), [(0.02, 0.1), (0.01, 0.05), (0.05, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_coverage_of_the_interval_in_2000_studies(seeds, of_seeds, of_problems):
    found = coverage(2000, seeds, of_seeds=of_seeds, of_problems=of_problems, of_rest=0.3)
    print(f"{seeds} seeds, spread of seeds {of_seeds}, of problems {of_problems}: {found:.1%}")
    assert 0.93 <= found <= (0.975 if of_seeds or of_problems else 0.99)


def test_the_interval_of_one_seed_is_students():
    table = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]])
    assert crossed_interval(table) == pytest.approx(ttest_1samp(table[0], 0).confidence_interval(0.95))
    assert crossed_interval(np.ones((1, 4))) == crossed_interval(np.ones((3, 4))) == (1.0, 1.0)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_tuning_problems_are_none_of_the_held_out_ones():
    some = replace(plan(), held_out=300, tune_problems=200)
    task = task_of(some)
    final, tuning = ({problem.prompt for problem in found} for found in (task.held_out(), task.tuning()))
    assert (len(final), len(tuning)) == (300, 200)
    assert not final & tuning


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


# --- data of the user's ----------------------------------------------------------------------------------------------


def files_of(task, folder):
    """The embedded task's problems, as a user's files."""
    asked = {
        "train": task.prompts(8, seed=3),
        "held_out": [{"prompt": problem.prompt, "answer": problem.answer} for problem in task.held_out()],
        "tuning": [{"prompt": problem.prompt, "answer": problem.answer} for problem in task.tuning()],
    }
    for name, rows in asked.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": str(folder / "train.jsonl"),
        "benchmark": f"embedded={folder / 'held_out.jsonl'}",
        "tune_benchmark": f"embedded={folder / 'tuning.jsonl'}",
    }


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


def test_learning_curves_are_judged_by_the_task(tmp_path):
    class Asked:
        def curve(self):
            return ["a", "b", "c", "d"]

        def right(self, model, tokenizer, problems, *, sampled):
            return [problem == "c" and not sampled for problem in problems]

    curve = Curve(plan(), Asked(), None)
    curve.answer(SimpleNamespace(global_step=3), None)
    assert curve.points == [{"step": 3, "seconds": 0.0, "accuracy": 0.25}]


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


def test_every_worker_takes_a_gpu_of_its_own(monkeypatch):
    from multiprocessing import get_context

    free = get_context("spawn").SimpleQueue()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command._take_gpu(free)
    assert "CUDA_VISIBLE_DEVICES" not in command.os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert command._gpus() == ["3", "5"]
    for gpu in command._gpus():
        free.put(gpu)
    for gpu in ("3", "5"):
        command._take_gpu(free)
        assert command.os.environ["CUDA_VISIBLE_DEVICES"] == gpu


@pytest.fixture
def runs(monkeypatch):
    """Training is replaced: an arm's answers follow from its options."""
    done = []

    def run(some, job):
        if job.options.get("learning_rate") == 13:
            raise RuntimeError("bad luck")
        done.append((job.arm, job.seed, job.held_out, job.steps))
        good = int(6 * job.options.get("learning_rate", 0.5))
        answers = [1] * good + [0] * (6 - good)
        record = {"version": 1, "settings": settings_of(some, job), "right": {"greedy": answers, "sampled": answers},
                  "curve": [], "seconds_training": 3.0 if job.arm == "topd" else 2.0, "seconds": 4.0}  # fmt: skip
        job.file.parent.mkdir(parents=True, exist_ok=True)
        job.file.write_text(json.dumps(record))
        return record

    monkeypatch.setattr(command, "run_job", run)
    return done


ARMS = {
    "opd": {"method": "opd", "choices": [{"learning_rate": 0.2}, {"learning_rate": 0.5}]},
    "topd": {"method": "topd", "choices": [{"learning_rate": 0.9}, {"learning_rate": 0.4}]},
    "longer": {"method": "opd", "time_of": "topd"},
}


def test_each_arm_is_tuned_runs_with_its_best_and_gets_the_time_it_should(runs, tmp_path):
    result = command.run_study(plan(arms=ARMS), tmp_path)
    assert result["tuned"] == {"opd": {"learning_rate": 0.5}, "topd": {"learning_rate": 0.9}}
    assert result["tuning"]["topd"] == [
        {"choice": {"learning_rate": 0.9}, "accuracy": pytest.approx(5 / 6)},
        {"choice": {"learning_rate": 0.4}, "accuracy": pytest.approx(2 / 6)},
    ]
    assert "longer" not in result["tuning"]
    assert [run[2] for run in runs].count(False) == 4
    assert ("longer", 0, True, 6) in runs  # 4 steps x 3 s / 2 s
    assert result["arms"]["topd"]["greedy"]["beside_opd"]["mean"] == pytest.approx(2 / 6)
    assert result["arms"]["longer"]["greedy"]["beside_opd"]["mean"] == 0.0  # with opd's learning rate
    assert result["arms"]["topd"]["right"] == {seed: dict.fromkeys(("sampled", "greedy"), "111110") for seed in "01"}
    written = json.loads((tmp_path / "study.json").read_text())
    assert (written["version"], written["arms"], written["tuning"]) == (2, result["arms"], result["tuning"])


def test_a_study_is_shown_against_any_arm(runs, tmp_path, capsys):
    result = command.run_study(plan(arms=ARMS), tmp_path)
    file = tmp_path / "study.json"
    assert answers(result, "greedy")["topd"][1] == [1, 1, 1, 1, 1, 0]
    rows = {row[0]: row for row in study_rows(result, "greedy", "topd")}
    assert rows["opd"][2:5] == ["-33.3 (-87.5 to +20.9)", "1", "0/2"]
    assert rows["topd"][2:5] == ["", "", "2 seeds"]
    capsys.readouterr()
    assert main(["study", "--show", str(file), "--against", "topd"]) == 0
    shown = capsys.readouterr().out
    assert "minus topd" in shown
    assert "-33.3 (-87.5 to +20.9)" in shown
    assert main(["study", "--show", str(file), "--against", "tpd"]) == 2
    assert "no arm 'tpd'" in capsys.readouterr().err
    file.write_text('{"version": 1, "arms": {}}')
    assert main(["study", "--show", str(file)]) == 2
    assert "no study.json of version 2" in capsys.readouterr().err


def test_it_goes_on_where_it_was_interrupted(runs, tmp_path):
    command.run_study(plan(arms=ARMS), tmp_path)
    first = list(runs)
    (tmp_path / "runs" / "topd" / "1.json").unlink()
    command.run_study(plan(arms=ARMS), tmp_path)
    assert runs == [*first, ("topd", 1, True, 4)]
    command.run_study(plan(arms=ARMS, seeds=[0, 1, 2]), tmp_path)
    assert {run[1] for run in runs[len(first) + 1 :]} == {2}


def test_a_run_that_fails_does_not_take_the_others_along(runs, tmp_path):
    arms = {"opd": {"method": "opd"}, "topd": {"learning_rate": 13}, "other": {"method": "topd"}}
    with pytest.raises(TOPDError, match=r"2 runs failed.*\n  topd, seed 0: RuntimeError: bad luck"):
        command.run_study(plan(arms=arms), tmp_path)
    assert [run[:2] for run in runs] == [("opd", 0), ("other", 0), ("opd", 1), ("other", 1)]


def test_a_worker_that_is_killed_is_told_and_what_was_done_is_kept(runs, tmp_path, monkeypatch):
    class Killed:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, run, some, job):
            future = Future()
            if job.seed:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(run(some, job))
            return future

    monkeypatch.setattr(command, "ProcessPoolExecutor", Killed)
    with pytest.raises(TOPDError, match=r"(?s)2 runs failed.*opd, seed 1: a worker was killed"):
        command.run_study(plan(), tmp_path, workers=2)
    assert json.loads((tmp_path / "study.json").read_text())["arms"]["topd"]["greedy"]["seeds"] == [0]


def test_arms_and_seeds_can_be_chosen(runs, tmp_path, capsys):
    import yaml

    arms = {"opd": {"method": "opd"}, "topd": {"method": "topd"}, "other": {"method": "topd"}}
    arms["longer"] = {"method": "opd", "time_of": "topd"}
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"student": "a", "teacher": "b", "seeds": [5, 6], "steps": 1, "arms": arms}))
    chosen = ["study", "--config", str(file), "--out", str(tmp_path / "out")]
    assert main([*chosen, "--arms", "topd", "--seeds", "1"]) == 0
    assert [run[:2] for run in runs] == [("opd", 5), ("topd", 5)]
    assert main([*chosen, "--arms", "longer", "--seeds", "1"]) == 0  # with the arm whose time it gets
    assert [run[:2] for run in runs[2:]] == [("longer", 5)]
    assert main([*chosen, "--arms", "tpd"]) == 2
    assert "no arm 'tpd'" in capsys.readouterr().err
