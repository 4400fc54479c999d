"""Windows are compared at equal length: EOS is repeated up to K (the paper's windows always have K tokens)."""

import pytest
import torch
from tiny import TOKENIZER, tiny_model

from topd.algorithm import exact_transport, make_targets, token_cost
from topd.near_future import Places
from topd.near_future.sampling import local_pair, written_rollouts
from topd.near_future.windows import Windows, comparable, padded_with_eos
from topd.training.method import Method
from topd.training.step import Pair, look_from

EOS, OTHER_EOS, K = 1, 2, 4


def windows(*rows):
    """Windows of K positions from lists of tokens."""
    tokens, mask = torch.zeros(len(rows), K, dtype=torch.long), torch.zeros(len(rows), K, dtype=torch.bool)
    for row, given in enumerate(rows):
        tokens[row, : len(given)], mask[row, : len(given)] = torch.tensor(given), True
    return Windows(tokens, mask)


def test_only_windows_that_eos_ended_are_padded_each_with_its_own():
    found = padded_with_eos(windows([5, EOS], [5, 6, OTHER_EOS], [5, 6], [5, 6, 7, EOS], []), [EOS, OTHER_EOS])
    assert found.tokens.tolist()[:2] == [[5, EOS, EOS, EOS], [5, 6, OTHER_EOS, OTHER_EOS]]
    assert found.mask.sum(1).tolist() == [4, 4, 2, 4, 0]


def test_a_window_cut_by_the_length_limit_is_compared_over_what_it_has():
    ours, theirs = comparable(windows([5, 6], [5, 6]), windows([5, 6, 7, 8], [5, EOS]), [EOS])
    assert ours.mask.sum(1).tolist() == theirs.mask.sum(1).tolist() == [2, 2]


def test_no_target_is_a_bag_of_the_teachers_rest_and_none_is_the_padding():
    """The student ends early, or the teacher does: every target is one real token."""
    short, long = windows([3, EOS], [3, 4, 5, 6]), windows([3, 4, 5, 6], [3, EOS])
    a, b = comparable(short, long, [EOS])
    plan = exact_transport(token_cost(a.tokens, b.tokens, torch.eye(9)), a.mask, b.mask).plan
    targets = make_targets("transport", plan, short.tokens, short.mask, long.tokens, long.mask)
    assert set(targets.weight.unique().tolist()) == {0.0, 1.0}  # one-hot
    assert not targets.weight[0, 2:].any()  # no context behind the student's EOS
    assert targets.guided.sum(1).tolist() == [2, 2]  # of the teacher's two tokens, each is the target of one position
    wanted = [long.tokens[1, column].item() for column in targets.weight[1].nonzero()[:, 1]]
    assert sorted(wanted) == [EOS, 3]


@pytest.mark.parametrize("embedding", ["student", "teacher", "student_hidden", "teacher_hidden"])
def test_the_distance_of_equal_windows_is_exactly_0(embedding):
    """So they are never forks, even where the threshold is 0. A model's states of equal tokens differ by rounding."""
    pair = Pair(*local_pair(tiny_model(0), tiny_model(0), TOKENIZER))
    prompt, response = torch.tensor([5, 6, 7]), torch.arange(4, 12)
    rollouts = written_rollouts([prompt], [response], TOKENIZER, prompt.device)
    places = Places(rollouts, torch.zeros(8, dtype=torch.long), torch.arange(8))
    found = look_from(places, pair, Method(student_window="regenerated", window_length=6, embedding=embedding))
    assert torch.equal(found.ours.tokens, found.theirs.tokens)
    assert not found.distance.any()
