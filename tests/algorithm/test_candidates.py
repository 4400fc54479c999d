"""Which positions are candidates: `highest_loss`."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topd.algorithm import highest_loss
from topd.algorithm.forks import PAPER_CANDIDATE_SHARE

RULES = [{}, {"share": 0.4}, {"share": None, "count": 3}]
rules = st.sampled_from(RULES)
named_rules = pytest.mark.parametrize("rule", RULES, ids=["paper", "share", "count"])


@st.composite
def rollouts(draw: st.DrawFn, fewest: int = 1) -> tuple[Tensor, Tensor]:
    """Losses in steps of 0.25, so that many are equal, and any mask, so that some rollouts are empty."""
    shape = draw(st.integers(fewest, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    losses = torch.randint(0, 6, shape, generator=generator) / 4
    return losses, torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))


def marked(chosen: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in chosen]


def test_a_rollout_worked_by_hand() -> None:
    loss = torch.tensor([[0.1, 2.0, 0.3, 9.0, 1.5, 2.0]])
    mask = torch.tensor([[True, True, True, False, True, True]])
    # Five positions count (9.0 does not). 0.4 * 5 = 2: the two losses of 2.0.
    assert marked(highest_loss(loss, mask, share=0.4)) == [[1, 5]]
    # 0.3 * 5 = 1.5 rounds to 2; 0.29 * 5 = 1.45 rounds to 1: the left one of the two that are equal.
    assert marked(highest_loss(loss, mask, share=0.3)) == [[1, 5]]
    assert marked(highest_loss(loss, mask, share=0.29)) == [[1]]
    assert marked(highest_loss(loss, mask, share=None, count=3)) == [[1, 4, 5]]


def test_equal_losses_are_taken_from_the_left_however_long_the_rollout() -> None:
    loss = torch.ones(1, 3000)  # long enough for a sort that is not stable to show
    loss[0, 1000:] = 2.0
    chosen = highest_loss(loss, torch.ones(1, 3000, dtype=torch.bool), share=None, count=40)
    assert marked(chosen) == [list(range(1000, 1040))]


def test_the_papers_share_marks_218_of_9688_positions() -> None:
    loss = torch.rand(1, 9688)
    assert int(highest_loss(loss, torch.ones(1, 9688, dtype=torch.bool)).sum()) == 218
    assert PAPER_CANDIDATE_SHARE == 0.0225


@given(case=rollouts(), rule=rules)
def test_the_candidates_are_those_of_the_oracle(case: tuple[Tensor, Tensor], rule: dict) -> None:
    expected = oracles.highest_loss(*case, **{"share": PAPER_CANDIDATE_SHARE} | rule)
    assert marked(highest_loss(*case, **rule)) == marked(expected)


@given(case=rollouts(), rule=rules)
def test_every_rollout_with_a_position_has_a_candidate_and_none_lies_outside_the_mask(
    case: tuple[Tensor, Tensor], rule: dict
) -> None:
    _, mask = case
    chosen = highest_loss(*case, **rule)
    assert chosen.any(-1).tolist() == mask.any(-1).tolist()
    assert not (chosen & ~mask).any()


@given(case=rollouts(), rule=rules)
def test_no_position_left_out_has_a_higher_loss_than_a_candidate(case: tuple[Tensor, Tensor], rule: dict) -> None:
    loss, mask = case
    for row, chosen in enumerate(highest_loss(loss, mask, **rule)):
        if mask[row].any():
            left_out = loss[row, mask[row] & ~chosen]
            assert (left_out <= loss[row, chosen].min()).all()


@given(case=rollouts(), rule=rules)
def test_a_mask_equals_the_subset_of_the_positions(case: tuple[Tensor, Tensor], rule: dict) -> None:
    loss, mask = case
    for row, chosen in enumerate(highest_loss(loss, mask, **rule)):
        inside = loss[row, mask[row]][None]
        alone = highest_loss(inside, torch.ones_like(inside, dtype=torch.bool), **rule)
        assert chosen[mask[row]].tolist() == alone[0].tolist()


@given(case=rollouts(), rule=rules, padding=st.integers(1, 5))
def test_padding_changes_nothing_whatever_stands_in_it(case: tuple[Tensor, Tensor], rule: dict, padding: int) -> None:
    loss, mask = case
    for value in (0.0, 1e9, torch.inf, torch.nan):
        padded = highest_loss(
            torch.nn.functional.pad(loss, (0, padding), value=value),
            torch.nn.functional.pad(mask, (0, padding), value=False),
            **rule,
        )
        assert marked(padded) == marked(highest_loss(loss, mask, **rule))


@given(case=rollouts(fewest=2), rule=rules, seed=st.integers(0, 2**20))
def test_a_batch_equals_the_loop_and_follows_a_permutation(case: tuple[Tensor, Tensor], rule: dict, seed: int) -> None:
    loss, mask = case
    batch = highest_loss(loss, mask, **rule)
    loop = [highest_loss(loss[[row]], mask[[row]], **rule) for row in range(len(loss))]
    assert marked(batch) == marked(torch.cat(loop))
    order = torch.randperm(len(loss), generator=torch.Generator().manual_seed(seed))
    assert marked(highest_loss(loss[order], mask[order], **rule)) == marked(batch[order])


@named_rules
def test_bf16_losses_are_ranked_like_their_values(rule: dict) -> None:
    loss = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(3, 40, dtype=torch.bool)
    assert marked(highest_loss(loss, mask, **rule)) == marked(highest_loss(loss.double(), mask, **rule))


@named_rules
def test_an_infinite_loss_is_the_first_candidate(rule: dict) -> None:
    loss = torch.tensor([[0.0, 0.2, torch.inf, 0.1]])
    assert 2 in marked(highest_loss(loss, torch.ones(1, 4, dtype=torch.bool), **rule))[0]


def test_a_count_beyond_the_rollout_takes_all_of_it() -> None:
    mask = torch.tensor([[True, True, True, True], [False, True, False, False], [False] * 4])
    assert marked(highest_loss(torch.rand(3, 4), mask, share=None, count=3))[1:] == [[1], []]
    assert marked(highest_loss(torch.rand(3, 4), mask, share=1.0)) == [[0, 1, 2, 3], [1], []]


def test_no_rollouts_and_no_positions_give_no_candidates() -> None:
    for shape in ((0, 4), (2, 0)):
        assert highest_loss(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)).shape == shape


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"count": 3}, r"either share or count \(got share=0.0225, count=3"),
        ({"share": None}, "either share or count"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"share": None, "count": 0}, "count must be at least 1, got 0"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_remedy(rule: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        highest_loss(torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool), **rule)
