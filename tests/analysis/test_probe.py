"""The probe on pairs with known answers."""

import copy

import numpy
import pytest
import torch
from tiny import TOKENIZER, tiny_model

from topd.analysis.probe import ProbeOptions, measure, probe_records
from topd.analysis.probe_summary import (
    Group,
    correlations,
    false_alarm_share,
    of_group,
    probe_of,
    resampled,
    summary,
    threshold,
    token_table,
)
from topd.embedded.task import make_problems
from topd.near_future.sampling import local_pair, sample_rollouts


def run(student, teacher):
    torch.manual_seed(0)
    texts = [problem.prompt for problem in make_problems(6, 0, held_out=False)]
    rollouts = sample_rollouts(student, TOKENIZER, texts, max_new_tokens=20)
    return probe(student, teacher, rollouts, 5)


def probe(student, teacher, rollouts, window_length):
    options = ProbeOptions(0.1, (window_length,), student_windows=("regenerated",))
    scores, groups = measure(*local_pair(student, teacher, TOKENIZER), rollouts, options)
    return probe_of(probe_records(rollouts, scores, groups, TOKENIZER.decode, 0), options.main)


def test_a_model_s_greedy_windows_do_not_part_from_its_own():
    model = tiny_model(0)
    found = run(model, model)
    assert all((group.distances == 0).all() for group in found.values())
    assert false_alarm_share(found) == 1


def test_different_models_part():
    found = run(tiny_model(0), tiny_model(1, width=96))
    assert numpy.median(found["high"].distances) > 0.1
    assert len({len(group.distances) for group in found.values()}) == 1


def group(distances, loss=0.0, teacher_nll=0.0, rollout=None):
    distances = numpy.array(distances)
    rollout = numpy.arange(len(distances)) if rollout is None else numpy.array(rollout)
    loss, teacher_nll = (numpy.broadcast_to(values, distances.shape) for values in (loss, teacher_nll))
    return Group(distances, rollout, loss, teacher_nll, numpy.full(distances.shape, numpy.nan))


def test_the_share_by_hand_and_its_interval():
    low = group([0.0, 0.1, 0.2, 0.3])
    found = {"high": group([0.1, 0.2, 0.5, 0.9], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]), "random": low, "low": low}
    assert threshold(found) == pytest.approx(0.225)  # linear between 0.2 and 0.3
    assert false_alarm_share(found) == 0.5
    share = summary(found, samples=500)["false_alarm_share"]
    assert share["low"] <= share["value"] == 0.5 <= share["high"]


@pytest.mark.filterwarnings("error")
def test_a_correlation_that_no_sample_defines_is_nan_without_a_warning():
    """Responses of one token, or a teacher whose losses are all equal."""
    flat = group([0.1, 0.2, 0.3])
    found = summary({"high": flat, "random": flat, "low": flat}, samples=20)
    unknown = [each for each in found.values() if isinstance(each, dict) and numpy.isnan(each.get("value", 0.0))]
    assert unknown
    assert all(numpy.isnan([each["low"], each["high"]]).all() for each in unknown)


def renamed(student, names):
    """A teacher that says `names[token]` where the student says `token`, and otherwise is the student."""
    teacher = copy.deepcopy(student)
    head = student.get_output_embeddings().weight.detach().clone()
    order = torch.arange(len(head))
    for one, other in names.items():
        order[one], order[other] = other, one
    teacher.get_output_embeddings().weight = torch.nn.Parameter(head[order])
    return teacher


def untied(seed=0, synonyms=0):
    """A model with a head of its own; token i + synonyms has the embedding of token i."""
    model = tiny_model(seed)
    table = model.get_input_embeddings().weight.detach().clone()
    model.get_output_embeddings().weight = torch.nn.Parameter(table.clone())
    if synonyms:
        table[5 + synonyms : 5 + 2 * synonyms] = table[5 : 5 + synonyms]
    model.get_input_embeddings().weight = torch.nn.Parameter(table)
    return model


def test_a_teacher_that_only_renames_tokens_is_all_false_alarms():
    """Every token has a synonym with the same embedding: the futures differ in every word and in nothing else."""
    synonyms = 20
    student = untied(synonyms=synonyms)
    teacher = renamed(student, {5 + i: 5 + synonyms + i for i in range(synonyms)})
    found = run(student, teacher)
    assert found["high"].loss.min() > 0.5  # the losses are high
    assert found["high"].distances.max() < 1e-6
    assert false_alarm_share(found) == 1


def test_a_teacher_that_differs_in_one_token_forks_there():
    student = untied()
    torch.manual_seed(0)
    texts = [problem.prompt for problem in make_problems(6, 0, held_out=False)]
    rollouts = sample_rollouts(student, TOKENIZER, texts, max_new_tokens=20)
    usual = int(torch.bincount(rollouts.response_ids[rollouts.response_mask.bool()]).argmax())
    teacher = renamed(student, {usual: (usual + 7) % 40})
    found = probe(student, teacher, rollouts, 3)
    assert numpy.median(found["high"].distances) > 0.1
    assert numpy.median(found["low"].distances) < numpy.median(found["high"].distances)


def test_correlations_by_hand():
    loss = [1.0, 2.0, 3.0, 10.0]
    found = correlations(group([0.1, 0.3, 0.2, 0.9], loss))
    assert found["pearson"] == pytest.approx(numpy.corrcoef(loss, [0.1, 0.3, 0.2, 0.9])[0, 1])
    assert found["spearman"] == pytest.approx(0.8)
    assert numpy.isnan(correlations(group([0.0] * 4, loss))["pearson"])


def test_resampling_draws_whole_rollouts():
    places = group(numpy.arange(6.0), rollout=[0, 0, 1, 1, 2, 2])
    again = resampled(dict.fromkeys(("high", "random", "low"), places), numpy.random.default_rng(0))
    for drawn in again.values():
        assert len(drawn.distances) == 6
        assert set(numpy.unique(drawn.distances, return_counts=True)[1]) <= {1, 2, 3}
        assert (drawn.rollout == again["high"].rollout).all()


def test_which_tokens_are_false_alarms():
    def place(token, distance, group="high"):
        return {"group": group, "token": token, "distance": {"v": distance}}

    records = [{"places": [place("a", 0.1), place("a", 0.9), place("a", 0.2), place("b", 0.9), place("c", None)]},
               {"places": [place("b", 0.8), place("b", 0.7), place("a", 0.0, "low")]}]  # fmt: skip
    assert token_table(records, "v", threshold=0.5) == [
        {"token": "a", "n": 3, "false_alarms": 2, "forks": 1},
        {"token": "b", "n": 3, "false_alarms": 0, "forks": 3},
    ]


def test_the_share_near_zero_by_hand():
    assert of_group(group([0.0, 0.019, 0.02, 0.5]))["near_zero"] == 0.5  # 0.02 itself is in the second bin


def test_the_teacher_s_nll_is_correlated_where_it_is_finite():
    found = correlations(group([0.1, 0.3, 0.2, 0.9], teacher_nll=[1.0, 3.0, 2.0, numpy.inf]))
    assert found["pearson_nll"] == pytest.approx(1.0)
    assert found["spearman_nll"] == pytest.approx(1.0)


def measured(**options):
    """Six rollouts of a student, and what the probe measures at them."""
    student, teacher = tiny_model(0), tiny_model(1, width=96)
    torch.manual_seed(0)
    texts = [problem.prompt for problem in make_problems(6, 0, held_out=False)]
    rollouts = sample_rollouts(student, TOKENIZER, texts, max_new_tokens=20)
    pair = local_pair(student, teacher, TOKENIZER)
    return pair, rollouts, *measure(*pair, rollouts, ProbeOptions(share=0.2, window_lengths=(5,), **options))


def test_the_three_readings_of_the_student_s_window_are_measured_at_the_same_places():
    _, rollouts, _, groups = measured(student_windows=("candidate", "rollout", "regenerated"))
    begun = []
    for found in groups.values():
        candidate = found.places.tokens
        assert (found.ours["candidate"].tokens[:, 0] == candidate).all()
        for row, position, tokens, mask in zip(
            found.places.rows,
            found.places.positions,
            found.ours["rollout"].tokens,
            found.ours["rollout"].mask,
            strict=True,
        ):
            wanted = rollouts.response_ids[row, position : position + 5]
            assert tokens[mask].tolist() == wanted[rollouts.response_mask[row, position : position + 5].bool()].tolist()
        assert torch.equal(found.begins, found.ours["regenerated"].tokens[:, 0] == candidate)
        same = found.ours["candidate"].tokens[found.begins] == found.ours["regenerated"].tokens[found.begins]
        assert same.all()  # a regenerated window that begins with the candidate is the candidate window
        begun += found.begins.tolist()
        for reading in ("candidate", "rollout", "regenerated"):
            assert found.distances[f"{reading}/student/cosine/5"].shape == candidate.shape
    assert any(begun)
    assert not all(begun)


@pytest.mark.parametrize("ranking", ["teacher_nll", "log_ratio"])
def test_high_loss_places_are_those_that_the_ranking_says(ranking):
    pair, rollouts, _, groups = measured(ranking=ranking)
    mask = rollouts.response_mask.bool()
    student, teacher = (
        model.head().logits(model.hidden(rollouts)).log_softmax(-1).gather(-1, rollouts.response_ids[..., None])[..., 0]
        for model in pair
    )
    value = -teacher if ranking == "teacher_nll" else student - teacher
    for row in range(len(rollouts)):
        taken = groups["high"].places.positions[groups["high"].places.rows == row]
        highest = value[row].masked_fill(~mask[row], -torch.inf).topk(len(taken)).indices
        assert sorted(taken.tolist()) == sorted(highest.tolist())


def test_the_share_and_the_table_of_tokens_count_the_same_false_alarms():
    distances = numpy.array([0.5, 0.5000004, 0.7])
    found = {"high": group(distances), "random": group(distances), "low": group(numpy.full(4, 0.5))}
    places = [{"group": "high", "token": "a", "distance": {"v": distance}} for distance in distances]
    (row,) = token_table([{"places": places}], "v", threshold(found))
    assert false_alarm_share(found) == row["false_alarms"] / row["n"] == 1 / 3
