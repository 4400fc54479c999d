"""What the functions are given where nothing checks their annotations, as outside of these tests."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from topd.algorithm import (
    Head,
    KnownTokens,
    LikelihoodTerms,
    Targets,
    cap_weights,
    distillation_loss,
    entropic_transport,
    exact_transport,
    ground_cost,
    highest_loss,
    known_token_kl,
    make_targets,
    position_weights,
    prefix_weights,
    score_tokens,
    select_for_capping,
    token_kl,
)

LOSSES, MASK, EVERY = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 1, 0]]), torch.ones(1, 2).long()
COST, TOKENS, HEAD = torch.tensor([[[0.0, 3.0], [1.0, 0.0]]]), torch.tensor([[4, 5]]), Head(torch.eye(3))


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the checks of annotations that the tests add."""
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    ("function", "arguments", "masks"),
    [
        (cap_weights, (LOSSES,), (MASK, torch.ones_like(MASK))),
        (highest_loss, (LOSSES,), (MASK,)),
        (prefix_weights, (LOSSES, 0 * LOSSES), (MASK, 4.0)),
        (exact_transport, (COST,), (EVERY, EVERY)),
        (entropic_transport, (COST,), (EVERY, EVERY)),
    ],
)
def test_masks_of_ones_and_zeros_are_masks(function, arguments, masks) -> None:
    booleans = [mask.bool() if isinstance(mask, torch.Tensor) else mask for mask in masks]
    assert_close(bare(function)(*arguments, *masks), function(*arguments, *booleans), equal_nan=True)


def test_targets_take_such_masks_too() -> None:
    plan = exact_transport(COST, EVERY.bool(), EVERY.bool()).plan
    expected = make_targets("transport", plan, TOKENS, EVERY.bool(), TOKENS, EVERY.bool())
    assert_close(bare(make_targets)("transport", plan, TOKENS, EVERY, TOKENS, EVERY), expected)


@pytest.mark.parametrize("solve", [exact_transport, entropic_transport])
def test_integer_costs_have_the_plan_of_the_same_floats(solve) -> None:
    expected = solve(COST, EVERY.bool(), EVERY.bool())
    assert_close(bare(solve)(COST.long(), EVERY.bool(), EVERY.bool()), expected)
    assert expected.plan.sum() == 1
    with pytest.raises(ValueError, match=r"must be \[window, student, teacher\], not \[2, 2\]"):
        bare(solve)(COST[0], EVERY[0].bool(), EVERY[0].bool())


NONE = LikelihoodTerms(*torch.zeros(2, 0).long(), torch.zeros(0))
UNKNOWN = [
    (lambda: bare(token_kl)(LOSSES, LOSSES, "backward"), "direction must be one of reverse, forward; got 'backward'"),
    (lambda: bare(score_tokens)(COST[0], HEAD, COST[0], HEAD, TOKENS[0], "backward"), "direction must be one of"),
    (lambda: bare(distillation_loss)(COST[0], HEAD, COST[0], HEAD, COST[0, 0], NONE, "back"), "direction must be one"),
    (lambda: bare(ground_cost)(COST, COST, "euclidean"), "kind must be one of cosine, sqeuclidean"),
    (lambda: bare(make_targets)("ot", COST, TOKENS, EVERY, TOKENS, EVERY), "kind must be one of transport"),
    (lambda: bare(position_weights)(Targets(COST, TOKENS), "max"), "reduction must be one of mean, sum, per_token"),
    (lambda: bare(select_for_capping)(LOSSES[0], "lowest"), "selection must be one of low, high, random"),
]


@pytest.mark.parametrize(("call", "message"), UNKNOWN)
def test_a_misspelt_choice_is_refused_and_not_taken_for_another(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_states_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one row per position.*student_hidden \[2, 3\], teacher_hidden \[4, 3\]"):
        bare(score_tokens)(torch.zeros(2, 3), HEAD, torch.zeros(4, 3), HEAD, torch.zeros(2).long())
    with pytest.raises(ValueError, match="share a vocabulary, but their logits have 3 and 1 tokens"):
        bare(token_kl)(torch.zeros(2, 3), torch.zeros(2, 1))


def test_a_known_token_that_the_student_cannot_write_counts_nothing() -> None:
    teacher = KnownTokens(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.5]]).log())
    kl = known_token_kl(torch.tensor([[0.0, 0.5]]).log(), teacher).kl  # 0.5 log (0.5 / 0.5) + 0.5 log (0.5 / 0.25)
    assert_close(kl, 0.5 * torch.tensor([2.0]).log())
