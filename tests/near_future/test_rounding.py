"""In 16 bits `generate` may choose another of two nearly equal tokens; no model is refused or slowed down for it."""

import pytest
import torch
from special_models import SIZES
from transformers import Qwen3Config, Qwen3ForCausalLM

from topd.near_future.model_parts import evaluating, own_settings_only
from topd.near_future.self_check import Check, batching_of
from topd.near_future.ways import ways_of


def flat_model(seed):
    """A bfloat16 model whose most likely tokens are often nearly equal."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"vocab_size": 4000})).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.bfloat16()


def rounded_by_rows(model):
    """Where several rows share a batch, linear layers add up in another order, as the kernels of a GPU do."""

    def in_two_parts(layer, inputs, output):
        (states,) = inputs
        half = states.shape[-1] // 2
        if len(states) == 1:
            return output
        return states[..., :half] @ layer.weight[:, :half].T + states[..., half:] @ layer.weight[:, half:].T

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(in_two_parts)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_kernels_that_round_by_the_rows_of_a_batch_change_no_verdict(seed):
    batching = batching_of(rounded_by_rows(flat_model(seed)), 30)
    assert (batching.left_padding, batching.leaving) == (True, True), batching.reasons


@pytest.mark.parametrize("seed", range(3))
def test_a_model_whose_generate_rounds_its_logits_is_not_refused(seed, monkeypatch):
    monkeypatch.setattr(Check, "_sampled", lambda check: "as for a model that keeps no states")
    assert ways_of(flat_model(seed)).left_padding


def test_a_model_that_continues_padded_prompts_with_wrong_tokens_is_found():
    model = flat_model(0)

    def wrong_where_padded(layer, inputs, output):
        if len(inputs[0]) > 1:
            output[:, -1] = output[:, -1].flip(-1)

    model.lm_head.register_forward_hook(wrong_where_padded)
    with evaluating(model), own_settings_only(model):
        check = Check(model)
        assert check._padded() is None
        assert "padded prompts" in check._padded_tokens()
    assert not batching_of(model, 30).left_padding
