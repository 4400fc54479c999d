"""Local correction on the embedded pair and on pairs with known answers."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import TOKENIZER
from transformers import AutoModelForCausalLM

from topd.algorithm import token_kl
from topd.analysis.correct import ARMS, CorrectOptions, Corrector, find_forks
from topd.analysis.correct_command import OPTIONS, RECORDS, RESULT
from topd.analysis.probe import ProbeOptions, measure
from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.embedded.task import is_correct, make_problems
from topd.errors import NonFiniteError
from topd.near_future.sampling import local_pair, sample_rollouts
from topd.training import TOPDConfig
from topd.training.losses import last_parameters

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
    return student, corrector, find_forks(*pair, [rollouts[:3], rollouts[3:]], OPTIONS_HERE)


def test_at_most_one_fork_a_rollout_and_each_parts(embedded):
    *_, forks = embedded
    assert forks
    assert len({fork.rollout for fork in forks}) == len(forks)
    assert all(fork.distance > 0 for fork in forks)


def test_steps_that_make_the_student_compute_nan_end_in_a_message(embedded):
    _, corrector, forks = embedded
    start = {name: value.clone() for name, value in corrector.student.state_dict().items()}
    corrector.options = replace(OPTIONS_HERE, learning_rate=1e30)
    try:
        with pytest.raises(NonFiniteError, match=r"of the arm 'opd' the student computes NaN .* lower learning rate"):
            corrector.correct(forks[0], "opd")
    finally:
        corrector.options = OPTIONS_HERE
    assert all(torch.equal(value, start[name]) for name, value in corrector.student.state_dict().items())


def test_every_arm_moves_the_student_and_then_puts_it_back(embedded):
    student, corrector, forks = embedded
    start = {name: value.clone() for name, value in student.state_dict().items()}
    before = corrector.outcome(forks[0])
    assert before.distance == pytest.approx(forks[0].distance, abs=1e-6)
    seen = {arm: corrector.correct(forks[0], arm)[0] for arm in ARMS}
    for name, value in student.state_dict().items():
        assert torch.equal(value, start[name])
    assert corrector.outcome(forks[0]) == before
    assert any(outcome.window != before.window for outcome in seen.values())


def test_many_steps_of_opd_bring_the_teacher_s_likelihood_up(embedded):
    _, corrector, forks = embedded
    before = [corrector.outcome(fork).teacher_log_likelihood for fork in forks]
    after = [corrector.correct(fork, "opd")[0].teacher_log_likelihood for fork in forks]
    assert sum(after) > sum(before)


def test_a_model_has_no_fork_with_itself():
    model = load("student-standard")
    rollouts = sample_rollouts(model, TOKENIZER, [p.prompt for p in PROBLEMS], max_new_tokens=40)
    assert find_forks(*local_pair(model, model, TOKENIZER), [rollouts], OPTIONS_HERE) == []


def test_a_fork_is_above_the_upper_quartile_of_the_low_loss_places_of_all_rollouts(embedded):
    _, corrector, forks = embedded
    torch.manual_seed(0)
    rollouts = sample_rollouts(corrector.student, TOKENIZER, [p.prompt for p in PROBLEMS], max_new_tokens=64)
    wanted = ProbeOptions(0.06, (10,), student_windows=("regenerated",))
    scores, groups = measure(*corrector.pair, rollouts, wanted)
    threshold = groups["low"].distances[wanted.main].quantile(0.75)
    high = groups["high"]
    expected = {}
    for row in range(len(PROBLEMS)):
        parted = (high.places.rows == row) & (high.distances[wanted.main] > threshold + 1e-6)
        if parted.any():
            expected[row] = float(scores.kl[row, high.places.positions[parted]].max())
    assert {fork.rollout: fork.token_loss for fork in forks} == pytest.approx(expected, abs=1e-5)


def test_on_the_teacher_s_continuation_only_its_tokens_and_the_student_s_branch_are_trained_on(embedded):
    """OPD: the mean reverse KL over the teacher's window in its own contexts. TOPD adds lambda L_traj to it."""
    _, corrector, forks = embedded
    fork = forks[0]
    ours, teacher = corrector.pair
    window = fork.theirs.tokens[0][fork.theirs.mask[0]]
    row = torch.cat([fork.prefix, window])[None]
    with torch.no_grad():
        logits = [model.model(input_ids=row).logits[0, len(fork.prefix) - 1 : -1] for model in (ours, teacher)]
    opd = corrector.start("opd on teacher", fork)[0](None).loss
    assert float(opd) == pytest.approx(float(token_kl(*logits).mean()), abs=1e-5)
    loss, guided = corrector.start("topd on teacher", fork)
    same, own = corrector.start("topd", fork)
    trajectory = float(loss(guided).trajectory)
    assert float(loss(guided).loss) == pytest.approx(float(opd) + OPTIONS_HERE.guidance_weight * trajectory, abs=1e-4)
    assert trajectory == pytest.approx(float(same(own).trajectory), abs=1e-4)  # the same L_traj on either window
    assert trajectory > 0


def test_the_guidance_ratio_is_that_of_the_gradients(embedded):
    student, corrector, forks = embedded
    loss, guided = corrector.start("topd", forks[0])
    parameters = last_parameters(corrector.pair[0].backbone)
    whole, opd = (torch.autograd.grad(loss(windows).loss, parameters) for windows in (guided, None))
    rest = torch.stack([(a - b).square().sum() for a, b in zip(whole, opd, strict=True)]).sum().sqrt()
    expected = float(rest / torch.stack([b.square().sum() for b in opd]).sum().sqrt())
    assert corrector.correct(forks[0], "topd")[1] == pytest.approx(expected, rel=1e-2)
    assert corrector.correct(forks[0], "opd")[1] is None
    student.zero_grad()


def test_lambda_is_training_s_unless_said_otherwise():
    assert CorrectOptions().guidance_weight == TOPDConfig("unused", bf16=False, use_cpu=True).guidance_weight


def test_the_command_and_going_on(tmp_path, capsys):
    arms = ["opd", "topd", "opd on teacher", "topd on teacher"]
    short = ["--steps", "2", "--max-new-tokens", "48"]
    arguments = ["correct", "--rollouts", "4", "--batch", "4", "--window-length", "6", *short, "--arms", *arms]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / RESULT).read_text())
    assert set(result["measures"]) == {"distance", "teacher_log_likelihood", "agreement", "right"}
    for found in result["measures"].values():
        assert set(found["arms"]) == {"before", *arms}
        assert set(found["beside_opd"]) == {"topd", "topd on teacher"}
    records = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]
    for guided, plain in (("topd", "opd"), ("topd on teacher", "opd on teacher")):
        gain = [record["after"][guided]["distance"] - record["after"][plain]["distance"] for record in records]
        assert result["measures"]["distance"]["beside_opd"][guided]["mean"] == pytest.approx(sum(gain) / len(gain))
    assert set(result["guidance_ratio"]) == {"topd", "topd on teacher"}
    shown = capsys.readouterr().out
    assert "0.538" in shown
    assert "|lambda grad L_traj| / |grad L_OPD|" in shown
    whole = (tmp_path / RECORDS).read_text()
    (tmp_path / RECORDS).write_text(whole.splitlines(keepends=True)[0] + '{"torn')
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / RECORDS).read_text() == whole
    assert (tmp_path / OPTIONS).exists()
    *others, last = records  # a fork of another rollout, such as one sampled at another temperature
    lines = [json.dumps(record) + "\n" for record in (*others, last | {"prefix": "another text"})]
    (tmp_path / RECORDS).write_text("".join(lines))
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()] == records
    assert main([*arguments, "--steps", "3", "--out", str(tmp_path)]) == 2
    assert "other settings (options)" in capsys.readouterr().err


def test_an_unknown_arm_is_named(tmp_path, capsys):
    assert main(["correct", "--arms", "nothing", "--out", str(tmp_path)]) == 2
    assert "There is no arm 'nothing'; available: opd, topd" in capsys.readouterr().err
