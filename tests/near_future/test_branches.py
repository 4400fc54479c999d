"""A rollout and its windows in one row give what separate sequences give."""

import math

import pytest
import torch
from special_models import ATTENTION, special_model
from tiny import tiny_model
from torch.nn.attention.flex_attention import create_mask
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import sliding_window_causal_mask_function

from topd.near_future import (
    Branches,
    LocalModel,
    Places,
    Rollouts,
    Windows,
    hidden_with_branches,
    rollout_windows,
    ways_of,
)
from topd.near_future.attention_interface import Rule
from topd.near_future.branches import packed, separate, tree
from topd.near_future.continuations import until_eos

SIZES = {
    "vocab_size": 47, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip


def model_of(kind):
    torch.manual_seed(0)
    return {
        "qwen3": lambda: tiny_model(0, scale=1.5),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    }.get(kind, lambda: special_model(kind))().eval()


def rollouts_and_branches(padding=True):
    """Two prompts and two responses of different lengths, three, and one, windows of 4 tokens."""
    torch.manual_seed(1)
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1] if padding else [1] * 5, [1, 1, 1, 1, 1]])
    response_mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    rollouts = Rollouts(
        torch.randint(3, 47, (2, 5)) * prompt_mask, prompt_mask, torch.randint(3, 47, (2, 9)) * response_mask,
        response_mask, response_mask,
    )  # fmt: skip
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2:] = False
    mask[1, 1:] = False
    branches = Branches(torch.tensor([[0, 3, 8], [5, 0, 0]]), torch.randint(3, 47, (2, 3, 4)), mask)
    return rollouts, branches


@pytest.mark.parametrize(("padding", "checkpointing"), [(False, True), (True, False)])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma", *ATTENTION])
def test_packed_states_and_gradients_equal_separate_sequences(kind, padding, checkpointing):
    """Sliding windows of 8 tokens are longer than some prefixes and shorter than others."""
    model = model_of(kind)
    assert ways_of(model).packed_rows == math.inf
    rollouts, branches = rollouts_and_branches(padding)
    results = []
    for run in (packed, separate):
        model.zero_grad()
        if checkpointing and run is packed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        row, windows = run(model.base_model, rollouts, branches)
        row, windows = row[rollouts.response_mask.bool()], windows[branches.mask]
        (row.square().sum() + windows.pow(3).sum()).backward()
        results.append((row.detach(), windows.detach(), [p.grad for p in model.base_model.parameters()]))
        model.gradient_checkpointing_disable()
        model.eval()
    (row_a, windows_a, grads_a), (row_b, windows_b, grads_b) = results
    whole = torch.cat([g.flatten() for g in grads_b if g is not None]).norm()
    for a, b in zip([row_a, windows_a], [row_b, windows_b], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(grads_a, grads_b, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * whole


@pytest.mark.parametrize("rule", [Rule(), Rule(sliding_window_causal_mask_function(4))])
def test_eager_and_flex_attention_see_what_sdpa_sees(rule):
    row, start, length = 14, torch.tensor([[5, 8, 13], [9, 4, 4]]), 3
    layout = tree(row, start, length)
    dense = layout.mask(rule, "eager", {"dtype": torch.float32}) == 0
    block = layout.mask(rule, "flex_attention", {})
    whole = row + start.shape[1] * length
    flex = create_mask(block.mask_mod, 2, 1, whole, whole, device="cpu")
    assert torch.equal(dense, flex)
    sdpa = layout.mask(rule, "sdpa", {})
    assert torch.equal(dense[:, :, row:], sdpa.window_mask)
    assert not dense[:, :, :row, row:].any()
    among = torch.ones(row, row, dtype=torch.bool).tril() if sdpa.row_mask is None else sdpa.row_mask
    assert torch.equal(dense[:, :, :row, :row], among.expand(2, 1, -1, -1))


def test_a_sliding_rule_in_the_tree_by_hand():
    """A row of 4, one window of 3 that starts at 3, each token sees itself and two before."""
    mask = tree(4, torch.tensor([[3]]), 3).mask(Rule(sliding_window_causal_mask_function(3)), "sdpa", {})
    assert mask.row_mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert mask.window_mask[0, 0].int().tolist() == [
        [0, 1, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],  # the rollout is out of reach
    ]


@pytest.mark.parametrize("kind", ["qwen3.5", "lfm2"])
def test_a_model_with_recurrent_layers_goes_the_plain_way_and_is_right(kind):
    """Also where the states hardly mix, as in convolutions with small weights."""
    model = model_of(kind)
    rollouts, branches = rollouts_and_branches()
    with pytest.warns(UserWarning, match="after its own copy of the prefix"):
        _, windows = hidden_with_branches(model, model.base_model, rollouts, branches)
    prefix, tokens = rollouts.prefix(1, 5), branches.tokens[1, 0]
    alone = model.base_model(input_ids=torch.cat([prefix, tokens[:-1]])[None]).last_hidden_state[0, -4:]
    assert torch.allclose(windows[1, 0], alone, atol=1e-5)


def test_the_tree_by_hand():
    """Row of 3, two windows of 2 that start at 1 and at 2."""
    packed_row = tree(3, torch.tensor([[1, 2]]), 2)
    assert packed_row.position.tolist() == [[0, 1, 2, 1, 2, 2, 3]]
    assert packed_row.window_mask[0, 0].int().tolist() == [
        [1, 0, 0, 1, 0, 0, 0],  # window 1 sees the row before position 1
        [1, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],  # window 2 sees the row before position 2, not window 1
        [1, 1, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral-sliding"])
def test_windows_equal_generate_one_by_one(kind):
    model = model_of(kind)
    torch.manual_seed(3)
    prefixes = [torch.randint(3, 47, (n,)) for n in (9, 2, 5, 5, 12)]
    together = LocalModel(model, 0, [1], batch_size=3).continue_(prefixes, 7)
    for prefix, tokens, mask in zip(prefixes, together.tokens, together.mask, strict=True):
        alone = model.generate(
            input_ids=prefix[None], max_new_tokens=7, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        assert tokens[mask].tolist() == alone[0, len(prefix) :].tolist()


def test_eos_ends_a_window_and_is_part_of_it_even_where_pad_is_eos():
    tokens = torch.tensor([[5, 1, 1, 1], [1, 1, 1, 1], [5, 6, 7, 8]])
    assert until_eos(tokens, torch.tensor([1])).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True] * 4,
    ]


def test_rollout_windows_stop_at_the_end_of_the_response():
    rollouts, _ = rollouts_and_branches()
    windows = rollout_windows(Places(rollouts, torch.tensor([0, 1, 1]), torch.tensor([2, 4, 5])), 4)
    assert isinstance(windows, Windows)
    assert windows.mask.sum(-1).tolist() == [4, 2, 1]
    assert windows.tokens[0].tolist() == rollouts.response_ids[0, 2:6].tolist()
    assert windows.tokens[1, :2].tolist() == rollouts.response_ids[1, 4:6].tolist()
