"""Local correction on the embedded pair and on pairs with known answers."""

import json

import pytest
import torch
from tiny import TOKENIZER
from transformers import AutoModelForCausalLM

from topd.analysis.correct import ARMS, CorrectOptions, Corrector, find_forks
from topd.analysis.correct_command import OPTIONS, RECORDS, RESULT
from topd.cli import main
from topd.demo.pair import pair_folder
from topd.demo.task import is_correct, make_problems
from topd.near_future.sampling import local_pair, sample_rollouts

OPTIONS_HERE = CorrectOptions(window_length=10, share=0.06, learning_rate=1e-3, guidance_weight=1.0)
PROBLEMS = make_problems(6, 3, held_out=False)


def load(role):
    return AutoModelForCausalLM.from_pretrained(pair_folder(role), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def embedded():
    student, teacher = load("student-standard"), load("teacher")
    pair = local_pair(student, teacher, TOKENIZER)
    torch.manual_seed(0)
    rollouts = sample_rollouts(student, TOKENIZER, [p.prompt for p in PROBLEMS], max_new_tokens=64)
    lengths = rollouts.prompt_mask.sum(1).tolist()
    corrector = Corrector(
        student, pair, TOKENIZER, OPTIONS_HERE, lambda row, text: is_correct(text, PROBLEMS[row].answer), lengths, 96
    )
    return student, corrector, find_forks(*pair, rollouts, OPTIONS_HERE)


def test_at_most_one_fork_a_rollout_and_each_parts(embedded):
    *_, forks = embedded
    assert forks
    assert len({fork.rollout for fork in forks}) == len(forks)
    assert all(fork.distance > 0 for fork in forks)


def test_every_arm_moves_the_student_and_then_puts_it_back(embedded):
    student, corrector, forks = embedded
    start = {name: value.clone() for name, value in student.state_dict().items()}
    before = corrector.outcome(forks[0])
    assert before.distance == pytest.approx(forks[0].distance, abs=1e-6)
    seen = {arm: corrector.correct(forks[0], arm) for arm in ARMS}
    for name, value in student.state_dict().items():
        assert torch.equal(value, start[name])
    assert corrector.outcome(forks[0]) == before
    assert any(outcome.window != before.window for outcome in seen.values())


def test_many_steps_of_opd_bring_the_teacher_s_likelihood_up(embedded):
    _, corrector, forks = embedded
    before = [corrector.outcome(fork).teacher_log_likelihood for fork in forks]
    after = [corrector.correct(fork, "opd").teacher_log_likelihood for fork in forks]
    assert sum(after) > sum(before)


def test_a_model_has_no_fork_with_itself():
    model = load("student-standard")
    rollouts = sample_rollouts(model, TOKENIZER, [p.prompt for p in PROBLEMS], max_new_tokens=40)
    assert find_forks(*local_pair(model, model, TOKENIZER), rollouts, OPTIONS_HERE) == []


def test_the_command_and_going_on(tmp_path, capsys):
    arguments = ["correct", "--rollouts", "4", "--batch", "4", "--window-length", "6", "--arms", "opd", "topd"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / RESULT).read_text())
    assert set(result["measures"]) == {"distance", "teacher_log_likelihood", "agreement", "right"}
    for measure in result["measures"].values():
        assert set(measure["arms"]) == {"before", "opd", "topd"}
        assert set(measure["beside_opd"]) == {"topd"}
    assert "0.538" in capsys.readouterr().out
    whole = (tmp_path / RECORDS).read_text()
    (tmp_path / RECORDS).write_text(whole.splitlines(keepends=True)[0] + '{"torn')
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / RECORDS).read_text() == whole
    assert (tmp_path / OPTIONS).exists()
    assert main([*arguments, "--steps", "2", "--out", str(tmp_path)]) == 2
    assert "other settings (options)" in capsys.readouterr().err


def test_an_unknown_arm_is_named(tmp_path, capsys):
    assert main(["correct", "--arms", "nothing", "--out", str(tmp_path)]) == 2
    assert "There is no arm 'nothing'; there are: opd, topd" in capsys.readouterr().err
