"""A whole model with FlexAttention. torch compiles it, which takes minutes on a CPU, where it has no backward pass."""

import math

import pytest
import torch
from test_branches import SIZES, rollouts_and_branches
from transformers import Qwen3Config, Qwen3ForCausalLM

from topd.near_future import ways_of
from topd.near_future.branches import packed, separate


def model_with(attention, device="cpu"):
    torch.manual_seed(0)
    config = Qwen3Config(**{**SIZES, "head_dim": 32})
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention).to(device).eval()


@pytest.mark.slow
def test_on_a_cpu_it_takes_every_fast_path_without_gradients():
    model = model_with("flex_attention")
    ways = ways_of(model)
    assert (ways.shared_prefix, ways.packed_rows, ways.sampling_states) == (math.inf,) * 3
    assert list(ways.reasons) == ["trains"]
    rollouts, branches = rollouts_and_branches()
    with torch.no_grad():
        row, windows = packed(model.base_model, rollouts, branches)
        alone, windows_alone = separate(model_with("sdpa").base_model, rollouts, branches)
    assert torch.allclose(row[rollouts.response_mask.bool()], alone[rollouts.response_mask.bool()], atol=1e-5)
    assert torch.allclose(windows[branches.mask], windows_alone[branches.mask], atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here (pytest -m cuda on one)")
def test_on_cuda_packed_gradients_are_those_of_sdpa():
    with torch.device("cuda"):
        rollouts, branches = rollouts_and_branches()
    gradients = []
    for attention in ("flex_attention", "sdpa"):
        model = model_with(attention, "cuda")
        row, windows = packed(model.base_model, rollouts, branches)
        (row[rollouts.response_mask.bool()].square().sum() + windows[branches.mask].pow(3).sum()).backward()
        gradients.append([parameter.grad for parameter in model.base_model.parameters()])
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-3)
