"""Down-weighting: `select_for_capping` and `cap_weights`."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import cap_weights, select_for_capping, token_kl

selections = pytest.mark.parametrize("selection", ["low", "high", "random"])
seeds = st.integers(0, 2**20)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def rollouts(draw: st.DrawFn, fewest: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (some equal, some 0), any mask, any capped positions, also outside the mask."""
    shape = draw(st.integers(fewest, 4)), draw(st.integers(1, 9))
    random = generator(draw(seeds))
    loss = torch.randint(0, 9, shape, generator=random).double() / 4
    return loss, torch.rand(shape, generator=random) < 0.8, torch.rand(shape, generator=random) < 0.5


Case = tuple[Tensor, Tensor, Tensor]


def test_three_tokens_worked_by_hand() -> None:
    loss = torch.tensor([[4.0, 0.5, 1.0], [4.0, 0.5, 1.0]])
    capped = torch.tensor([[True, True, False], [False, False, True]])
    # The median of (4, 0.5, 1) is 1: 4 is brought down to 1 by a weight of 1/4; 0.5 is below already. In the second
    # rollout 4 is not capped, and 1 is at the median.
    assert cap_weights(loss, torch.ones(2, 3, dtype=torch.bool), capped).tolist() == [[0.25, 1, 1], [1, 1, 1]]
    # Without the first token the median is the mean of 0.5 and 1.0.
    mask = torch.tensor([[False, True, True], [False, True, True]])
    assert cap_weights(loss, mask, capped).tolist() == [[1, 1, 1], [1, 1, 0.75]]


@given(case=rollouts())
def test_the_weights_are_those_of_the_oracle(case: Case) -> None:
    assert_close(cap_weights(*case), oracles.cap_weights(*case))


@given(case=rollouts())
def test_a_capped_loss_is_at_most_the_median_and_everything_else_is_left_alone(case: Case) -> None:
    loss, mask, capped = case
    weights = cap_weights(*case)
    assert (weights[~(capped & mask)] == 1).all()
    assert (weights <= 1).all()
    assert (weights >= 0).all()
    for row in range(len(loss)):
        chosen = capped[row] & mask[row]
        median = loss[row, mask[row]].quantile(0.5) if chosen.any() else torch.tensor(0.0)
        assert_close((weights * loss)[row, chosen], loss[row, chosen].clamp(max=median.item()))


@given(case=rollouts(fewest=2), seed=seeds)
def test_a_batch_equals_the_loop_and_follows_a_permutation(case: Case, seed: int) -> None:
    batch = cap_weights(*case)
    assert_close(batch, torch.cat([cap_weights(*(each[[row]] for each in case)) for row in range(len(batch))]))
    order = torch.randperm(len(batch), generator=generator(seed))
    assert_close(cap_weights(*(each[order] for each in case)), batch[order])


@given(case=rollouts(), junk=st.sampled_from([0.0, 99.0, math.inf, math.nan]))
def test_padding_changes_nothing_whatever_stands_in_it(case: Case, junk: float) -> None:
    loss, mask, capped = case
    pad = torch.nn.functional.pad
    wide = pad(torch.where(mask, loss, junk), (0, 3), value=junk), pad(mask, (0, 3)), pad(capped, (0, 3), value=True)
    assert_close(cap_weights(*wide), pad(cap_weights(*case), (0, 3), value=1.0))


def test_a_capped_tokens_gradient_shrinks_by_median_over_loss_and_no_other_changes() -> None:
    logits, teacher = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    logits.requires_grad_()
    mask, capped = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    loss = token_kl(logits, teacher)
    highest = loss.argmax(-1)
    capped[[0, 1], highest] = True
    weights = cap_weights(loss, mask, capped)
    assert not weights.requires_grad
    (plain,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (scaled,) = torch.autograd.grad((weights * loss).sum(), logits)
    for row, position in enumerate(highest.tolist()):
        factor = loss[row].sort().values[2] / loss[row, position]  # of five losses, the third is the median
        assert 0 < factor < 1
        assert_close(scaled[row, position], factor.detach() * plain[row, position])
    assert torch.equal(scaled[~capped], plain[~capped])


def test_bf16_losses_are_capped_too() -> None:
    loss = torch.tensor([[4.0, 0.5, 1.0]], dtype=torch.bfloat16)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert cap_weights(loss, mask, torch.tensor([[True, False, False]])).tolist() == [[0.25, 1, 1]]


def test_a_weight_is_never_negative() -> None:
    loss = torch.tensor([[-1e-8, -1e-8, 2.0]])  # a KL of 0 in float32
    assert (cap_weights(loss, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[False, False, True]])) >= 0).all()


def test_no_rollouts_and_no_positions_have_no_weights() -> None:
    for shape in ((0, 4), (2, 0)):
        nothing = torch.zeros(shape, dtype=torch.bool)
        assert cap_weights(torch.zeros(shape), nothing, nothing).shape == shape


def test_ten_candidates_selected_by_hand() -> None:
    # The bottom 30 % of ten known distances are 0.1, 0.2 and 0.3, at places 1, 5 and 4.
    distance = torch.tensor([0.9, 0.1, 0.5, math.nan, 0.3, 0.2, 0.4, 0.7, 0.6, 1.0, 0.8])
    assert select_for_capping(distance).nonzero().flatten().tolist() == [1, 4, 5]
    assert select_for_capping(distance, share=0.5).nonzero().flatten().tolist() == [1, 2, 4, 5, 6]
    assert select_for_capping(distance, "high").nonzero().flatten().tolist() == [0, 9, 10]


def test_every_selection_has_the_same_number_however_many_ties_there_are() -> None:
    """30 zeros among 40 distances: 30 % are 12, by the quantile's value they would be 30 low ones and 10 high ones."""
    distance = torch.cat([torch.zeros(30), torch.linspace(0.1, 1.0, 10)])
    chosen = {name: select_for_capping(distance, name, generator=generator(0)) for name in ("low", "high", "random")}
    assert {name: int(each.sum()) for name, each in chosen.items()} == {"low": 12, "high": 12, "random": 12}
    assert distance[chosen["low"]].max() == 0
    assert int((distance[chosen["high"]] > 0).sum()) == 10
    assert not (chosen["low"] & chosen["high"]).any()  # ties are broken in the same order


@st.composite
def distances(draw: st.DrawFn) -> Tensor:
    values = st.integers(0, 9).map(lambda tenths: tenths / 10) | st.just(math.nan)
    return torch.tensor(draw(st.lists(values, max_size=12)), dtype=torch.float64)


@given(distance=distances(), share=st.sampled_from([0.0, 0.3, 0.8]), seed=seeds)
def test_the_controls_choose_as_many_as_the_false_alarms(distance: Tensor, share: float, seed: int) -> None:
    low, high, random = (
        select_for_capping(distance, selection, share, generator=generator(seed))
        for selection in ("low", "high", "random")
    )
    known = ~distance.isnan()
    count = int(share * int(known.sum()) + 0.5)
    for chosen in (low, high, random):
        assert int(chosen.sum()) == count
        assert not (chosen & ~known).any()
    if count and count < int(known.sum()):
        assert distance[low].max() <= distance[known & ~low].min()
        assert distance[high].min() >= distance[known & ~high].max()


@selections
def test_a_generator_decides_and_nothing_else_is_drawn(selection: str) -> None:
    distance = torch.arange(1, 41) / 40
    state = torch.get_rng_state()
    one, same, other = (select_for_capping(distance, selection, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (selection != "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_control_chooses_evenly() -> None:
    distance = torch.arange(1.0, 11.0)
    drawn = torch.stack([select_for_capping(distance, "random", generator=generator(seed)) for seed in range(1000)])
    often = drawn.double().mean(0)
    # 3 of 10 a draw; a standard error is sqrt(p (1 - p) / 1000) = 0.0145
    assert_close(often, torch.full_like(often, 0.3), atol=0.07, rtol=0)


def test_no_candidates_and_unknown_distances_leave_nothing_to_cap() -> None:
    for selection in ("low", "high", "random"):
        assert select_for_capping(torch.zeros(0), selection).shape == (0,)
        assert not select_for_capping(torch.full((4,), math.nan), selection).any()


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="false_alarm_share must be in"):
        select_for_capping(torch.tensor([0.1, 0.2]), "high", 1.0)
