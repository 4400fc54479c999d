"""`prefix_weights`: how likely stored prefixes still are."""

import math

import oracles
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from topd.algorithm import prefix_weights


def test_three_tokens_worked_by_hand():
    then = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    now = torch.tensor([[-0.5, -2.0, 7.0], [2.0, -1.0, -1.0]])
    # Drifts 0.5 and -1: weights 1, exp(0.5), exp(-0.25). In the second row exp(3) and exp(1.5) exceed 4.
    weights = prefix_weights(now, then, torch.ones(2, 3, dtype=torch.bool), 4.0)
    assert_close(weights, torch.tensor([[1.0, math.exp(0.5), math.exp(-0.25)], [1.0, 4.0, 4.0]]))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**20), st.sampled_from([1.0, 1.2, 4.0]))
def test_as_one_would_write_it_down(rollouts, positions, seed, most):
    random = torch.Generator().manual_seed(seed)
    now, then = torch.randn(2, rollouts, positions, generator=random, dtype=torch.float64)
    lengths = torch.randint(0, positions + 1, (rollouts, 1), generator=random)
    mask = torch.arange(positions) < lengths
    expected = torch.tensor(oracles.prefix_weights(now, then, mask, most), dtype=torch.float64)
    assert_close(prefix_weights(now, then, mask, most)[mask], expected[mask])
