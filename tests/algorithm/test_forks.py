"""Fork or false alarm: `is_fork` and the two thresholds."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topd.algorithm import false_alarm_threshold, is_fork, low_loss_threshold
from topd.algorithm.forks import PAPER_FALSE_ALARM_SHARE, rank_order


def by_share(distance: Tensor, share: float = PAPER_FALSE_ALARM_SHARE) -> Tensor:
    """Forks of a batch by the quantile rule."""
    return is_fork(distance, false_alarm_threshold(distance, share))


shares = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9])


@st.composite
def distances(draw: st.DrawFn, fewest: int = 0) -> Tensor:
    """Distances in steps of 0.1, so that many are equal, some 0 and some unknown."""
    values = st.integers(0, 9).map(lambda tenths: tenths / 10) | st.just(math.nan)
    return torch.tensor(draw(st.lists(values, min_size=fewest, max_size=15)), dtype=torch.float64)


def test_ten_candidates_worked_by_hand() -> None:
    # 30 % of ten are three: 0.1, 0.2 and 0.3 are false alarms.
    distance = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.4, 0.7, 0.6, 1.0])
    expected = [True, False, True, False, True, False, True, True, True, True]
    assert by_share(distance).tolist() == expected
    assert PAPER_FALSE_ALARM_SHARE == 0.30
    # Half of ten are 0.1 to 0.5. A threshold of 0.75 leaves 0.8, 0.9 and 1.0.
    assert distance[by_share(distance, 0.5)].tolist() == distance[[0, 4, 7, 8, 9]].tolist()
    assert distance[is_fork(distance, 0.75)].tolist() == distance[[0, 4, 9]].tolist()


def test_the_threshold_is_a_distance_of_the_batch() -> None:
    # 0.3 * 4 = 1.2 is one candidate, 0.4 * 4 = 1.6 is two; unknown distances do not count.
    distance = torch.tensor([0.5, math.nan, 0.25, 1.0, 0.75])
    assert false_alarm_threshold(distance, 0.3) == 0.25
    assert false_alarm_threshold(distance, 0.4) == 0.5
    assert false_alarm_threshold(distance, 0.1) == 0.0
    assert false_alarm_threshold(distance[:0], 0.3) == 0.0
    assert false_alarm_threshold(distance[1:2], 0.3) == 0.0


@given(distance=distances(), share=shares)
def test_the_forks_are_those_of_the_oracle(distance: Tensor, share: float) -> None:
    assert by_share(distance, share).tolist() == oracles.is_fork(distance, share)


@given(distance=distances(), threshold=st.sampled_from([-1.0, 0.0, 0.35, math.nan]))
def test_identical_futures_and_unknown_distances_are_never_forks(distance: Tensor, threshold: float) -> None:
    fork = is_fork(distance, threshold)
    assert not fork[distance == 0].any()
    assert not fork[distance.isnan()].any()


@given(distance=distances(), share=shares)
def test_every_fork_is_farther_than_every_false_alarm_and_equals_are_treated_alike(
    distance: Tensor, share: float
) -> None:
    fork = by_share(distance, share)
    if fork.any() and (~fork & ~distance.isnan()).any():
        assert distance[fork].min() > distance[~fork & ~distance.isnan()].max()


@given(distance=distances(fewest=1), share=shares, seed=st.integers(0, 2**20), unknown=st.integers(0, 4))
def test_order_and_unknown_distances_change_nothing(distance: Tensor, share: float, seed: int, unknown: int) -> None:
    fork = by_share(distance, share)
    order = torch.randperm(len(distance), generator=torch.Generator().manual_seed(seed))
    assert by_share(distance[order], share).tolist() == fork[order].tolist()
    padded = torch.cat([distance, torch.full((unknown,), math.nan, dtype=distance.dtype)])
    assert by_share(padded, share).tolist() == fork.tolist() + [False] * unknown


@given(distance=distances(), share=shares, parts=st.integers(1, 4))
def test_the_threshold_of_the_whole_batch_decides_alike_for_its_parts(
    distance: Tensor, share: float, parts: int
) -> None:
    threshold = false_alarm_threshold(distance, share)
    decided = [is_fork(part, threshold) for part in distance.tensor_split(parts)]
    assert torch.cat(decided).tolist() == by_share(distance, share).tolist()


@given(distance=distances(), factor=st.sampled_from([0.5, 4.0]), share=shares)
def test_the_unit_of_the_distance_does_not_matter_for_a_share(distance: Tensor, factor: float, share: float) -> None:
    scaled = by_share(factor * distance, share)
    assert scaled.tolist() == by_share(distance, share).tolist()


@given(distance=distances())
def test_a_larger_share_makes_no_new_forks(distance: Tensor) -> None:
    few, many = by_share(distance, 0.7), by_share(distance, 0.2)
    assert not (few & ~many).any()


def test_a_distance_at_the_threshold_is_a_false_alarm_in_any_precision() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        distance = torch.tensor([0.3, 0.1, 0.7, 0.9, 0.5, 0.3], dtype=dtype)
        # 0.5 * 6 = 3 candidates: 0.1, 0.3, 0.3
        assert by_share(distance, 0.5).tolist() == [False, False, True, True, True, False]
        at = float(distance[2])
        assert is_fork(distance, at).tolist() == [False, False, False, True, False, False]


def test_a_single_candidate_is_a_fork_unless_its_futures_are_identical() -> None:
    assert by_share(torch.tensor([0.4])).tolist() == [True]
    assert by_share(torch.tensor([0.0])).tolist() == [False]
    assert by_share(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"false_alarm_share must be in \[0, 1\), got {share}"):
        false_alarm_threshold(torch.tensor([0.1, 0.2]), share)


def test_the_low_loss_threshold_is_the_upper_quartile_of_the_known_distances() -> None:
    # 0, 0.1, 0.2, 0.4, 0.8: three quarters of the way is 0.4. Section 2.1.
    distance = torch.tensor([0.4, math.nan, 0.0, 0.8, 0.1, 0.2])
    assert low_loss_threshold(distance) == pytest.approx(0.4)
    assert math.isnan(low_loss_threshold(distance[1:2]))
    fork = is_fork(torch.tensor([0.39, 0.4, 0.41]), low_loss_threshold(distance))
    assert fork.tolist() == [False, False, True]


@given(distance=distances(), seed=st.integers(0, 2**20))
def test_ranks_go_up_and_leave_out_unknown_distances_only(distance: Tensor, seed: int) -> None:
    order = rank_order(distance)
    assert sorted(order.tolist()) == (~distance.isnan()).nonzero().flatten().tolist()
    assert (distance[order].diff() >= 0).all()
    assert torch.equal(order, rank_order(distance))


def test_ties_do_not_favour_the_first_rollouts() -> None:
    order = rank_order(torch.zeros(40))
    assert 12 < order[:20].double().mean() < 27  # of 0 to 39; in order it would be 9.5
