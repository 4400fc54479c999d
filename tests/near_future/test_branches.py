"""A rollout and its windows in one row give what separate sequences give."""

import pytest
import torch
from tiny import tiny_model
from torch.nn.attention.flex_attention import create_mask
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from topd.near_future import (
    Branches,
    LocalModel,
    Rollouts,
    Windows,
    hidden_with_branches,
    rollout_windows,
    supports_branches,
)
from topd.near_future.branches import block_mask, packed, separate, tree
from topd.near_future.shared_prefix import until_eos

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
        "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    }[kind]().eval()


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma"])
def test_packed_states_and_gradients_equal_separate_sequences(kind, padding, checkpointing):
    model = model_of(kind).double()
    assert supports_branches(model)
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
    # norms and rotary angles are float32 in these models, whatever the weights are
    for a, b in zip([row_a, windows_a, *grads_a], [row_b, windows_b, *grads_b], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("padding", [False, True])
def test_flex_attention_sees_what_the_tree_sees(padding):
    rollouts, branches = rollouts_and_branches(padding)
    start, length = rollouts.prompt_ids.shape[1] + branches.position, 3
    row = rollouts.input_ids.shape[1]
    whole = row + start.shape[1] * length
    block = block_mask(rollouts, start, length)
    dense = create_mask(block.mask_mod, len(rollouts), 1, whole, whole, device="cpu")
    packed_row = tree(rollouts, start, length)
    assert torch.equal(dense[:, :, row:], packed_row.window_mask)
    among = dense[:, :, :row, :row]
    if packed_row.row_mask is None:
        assert torch.equal(among[0, 0], torch.ones(row, row, dtype=torch.bool).tril())  # the first has no padding
        real = rollouts.attention_mask.bool()
        assert torch.equal(among[1, 0][real[1]][:, real[1]], torch.ones(11, 11, dtype=torch.bool).tril())
    else:
        assert torch.equal(among, packed_row.row_mask)
    assert not dense[:, :, :row, row:].any()


@pytest.mark.parametrize(("kind", "attention"), [("mistral-sliding", "sdpa"), ("llama", "eager")])
def test_a_model_that_takes_no_tree_goes_the_plain_way_and_is_right(kind, attention):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    rollouts, branches = rollouts_and_branches()
    with pytest.warns(UserWarning, match="behind its own copy of the prefix"):
        _, windows = hidden_with_branches(model, model.base_model, rollouts, branches)
    prefix, tokens = rollouts.prefix(1, 5), branches.tokens[1, 0]
    alone = model.base_model(input_ids=torch.cat([prefix, tokens[:-1]])[None]).last_hidden_state[0, -4:]
    assert torch.allclose(windows[1, 0], alone, atol=1e-5)


def test_the_tree_by_hand():
    """Row of 3 (first padded), two windows of 2 that start at 2 and at 3."""
    prompt_mask, response_mask = torch.tensor([[0, 1]]), torch.tensor([[1]])
    rollouts = Rollouts(torch.tensor([[0, 5]]), prompt_mask, torch.tensor([[6]]), response_mask, response_mask)
    packed_row = tree(rollouts, torch.tensor([[2, 3]]), 2)
    assert packed_row.row_mask[0, 0].int().tolist() == [
        [1, 0, 0],  # padding sees itself only
        [0, 1, 0],
        [0, 1, 1],
    ]
    assert packed_row.window_mask[0, 0].int().tolist() == [
        [0, 1, 0, 1, 0, 0, 0],  # window 1 sees the row before index 2
        [0, 1, 0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],  # window 2 sees the row before index 3, not window 1
        [0, 1, 1, 0, 0, 1, 1],
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
    windows = rollout_windows(rollouts, torch.tensor([0, 1, 1]), torch.tensor([2, 4, 5]), 4)
    assert isinstance(windows, Windows)
    assert windows.mask.sum(-1).tolist() == [4, 2, 1]
    assert windows.tokens[0].tolist() == rollouts.response_ids[0, 2:6].tolist()
    assert windows.tokens[1, :2].tolist() == rollouts.response_ids[1, 4:6].tolist()
