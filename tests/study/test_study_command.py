"""A study as a whole: it tunes, goes on, compares, and survives what fails. Training is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from small_studies import plan

from topd.cli.main import main
from topd.errors import TOPDError
from topd.study import command
from topd.study.run import settings_of
from topd.study.summary import answers, study_rows


def test_every_worker_takes_a_gpu_of_its_own(monkeypatch):
    from multiprocessing import get_context

    free = get_context("spawn").SimpleQueue()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command._begin_worker(free)
    assert "CUDA_VISIBLE_DEVICES" not in command.os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert command._gpus() == ["3", "5"]
    for gpu in command._gpus():
        free.put(gpu)
    for gpu in ("3", "5"):
        command._begin_worker(free)
        assert command.os.environ["CUDA_VISIBLE_DEVICES"] == gpu


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing can be killed so here")
def test_a_worker_imports_nothing_that_asks_for_gpus_before_it_has_its_own():
    code = "import sys, topd.study.command; print(any(m in sys.modules for m in ('transformers', 'accelerate')))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(
        """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from topd.study.command import _begin_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin_worker, initargs=(free,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as study:
        worker = int(study.stdout.readline())
        assert running(worker)
        study.kill()
    for _ in range(300):
        if not running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker waits for work for ever")


def running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # an orphan that has ended may wait to be reaped
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_not_there_is_told_before_anything_runs(runs, tmp_path, role):
    with pytest.raises(TOPDError, match=r"Cannot load the tokenizer of runs/nowhere"):
        command.run_study(plan(**{role: "runs/nowhere"}), tmp_path)
    assert not runs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "tpod"}, "arm topd: method must be one of"),
        ({"window_length": -1}, "arm topd: window_length must be at least 1"),
        ({"choices": [{"learning_rate": "fast"}]}, "arm topd: learning_rate is 'fast'"),
    ],
)
def test_an_option_that_no_run_can_have_is_told_before_anything_runs(runs, tmp_path, options, said):
    choices = {"choices": [{}]} if "choices" in options else {}
    with pytest.raises(TOPDError, match=said):
        command.run_study(plan(arms={"opd": {"method": "opd"} | choices, "topd": options}), tmp_path)
    assert not runs


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


def test_it_says_where_an_arm_could_not_choose_what_opd_is_tuned_to(runs, tmp_path, capsys):
    arms = ARMS | {"fair": {"method": "topd", "choices": [{"learning_rate": 0.5}, {"learning_rate": 0.4}]}}
    other = {"method": "topd", "learning_rate": 0.4, "choices": [{"guidance_weight": 0.1}, {"guidance_weight": 0.2}]}
    command.run_study(plan(arms=arms | {"of another option": other}), tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("could not choose") == 1
    assert "topd could not choose learning_rate 0.5, the tuned value of opd" in said


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
    assert "not a study.json of version 2" in capsys.readouterr().err


def test_it_goes_on_where_it_was_interrupted(runs, tmp_path):
    command.run_study(plan(arms=ARMS), tmp_path)
    first = list(runs)
    (tmp_path / "runs" / "topd" / "1.json").unlink()
    command.run_study(plan(arms=ARMS), tmp_path)
    assert runs == [*first, ("topd", 1, True, 4)]
    command.run_study(plan(arms=ARMS, seeds=[0, 1, 2]), tmp_path)
    assert {run[1] for run in runs[len(first) + 1 :]} == {2}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_adapter_without_its_base_is_refused_before_anything_runs(runs, tmp_path, role):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone"}')
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(TOPDError, match=r"The adapter in .* belongs to someone, which cannot be loaded"):
        command.run_study(plan(**{role: str(tmp_path)}), tmp_path / "out")
    assert runs == []


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
    file.write_text(
        yaml.safe_dump(
            {
                "student": "embedded:student-easy",
                "teacher": "embedded:teacher",
                "seeds": [5, 6],
                "steps": 1,
                "arms": arms,
            }
        )
    )
    chosen = ["study", "--config", str(file), "--out", str(tmp_path / "out")]
    assert main([*chosen, "--arms", "topd", "--seeds", "1"]) == 0
    assert [run[:2] for run in runs] == [("opd", 5), ("topd", 5)]
    assert main([*chosen, "--arms", "longer", "--seeds", "1"]) == 0  # with the arm whose time it gets
    assert [run[:2] for run in runs[2:]] == [("longer", 5)]
    assert main([*chosen, "--arms", "tpd"]) == 2
    assert "no arm 'tpd'" in capsys.readouterr().err


def test_an_arm_that_is_chosen_keeps_the_tuning_that_it_shares(runs, tmp_path):
    import yaml

    choices = [{"learning_rate": 0.9}, {"learning_rate": 0.4}]
    arms = {
        "opd": {"method": "opd", "choices": [{"learning_rate": 0.2}, {"learning_rate": 0.5}]},
        "topd": {"choices": choices},
        "soft": {"tuned_as": "topd"},
        "in its time": {"method": "opd", "time_of": "soft"},
    }
    file = tmp_path / "s.yaml"
    pair = {"student": "embedded:student-easy", "teacher": "embedded:teacher"}
    file.write_text(yaml.safe_dump(pair | {"seeds": [5], "steps": 1, "arms": arms}))
    for name in ("soft", "in its time"):
        out = tmp_path / name
        assert main(["study", "--config", str(file), "--out", str(out), "--arms", name]) == 0
        record = json.loads((out / "runs" / "soft" / "5.json").read_text())
        assert record["settings"]["arm_options"] == {"learning_rate": 0.9}


def test_an_arm_s_own_option_is_not_replaced_by_the_tuning_that_it_shares(runs, tmp_path):
    choices = [{"learning_rate": 0.9, "guidance_weight": 0.03}]
    arms = {
        "opd": {"method": "opd", "choices": [{"learning_rate": 0.5}]},
        "topd": {"choices": choices},
        "more": {"tuned_as": "topd", "guidance_weight": 0.3},
    }
    command.run_study(plan(arms=arms), tmp_path)
    record = json.loads((tmp_path / "runs" / "more" / "0.json").read_text())
    assert record["settings"]["arm_options"] == {"learning_rate": 0.9, "guidance_weight": 0.3}
