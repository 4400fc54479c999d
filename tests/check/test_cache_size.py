"""The sizes of caches, found without storage, beside the caches of models that run."""

import math

import pytest
import torch
from tiny_architectures import tiny
from transformers import LlamaConfig, LlamaModel

from topd.check.cache_size import tried_cache
from topd.check.machine import shape
from topd.check.setup import ModelInfo
from topd.near_future.recurrent_states import empty_cache
from topd.near_future.ways import ways_of

KINDS = [
    "MistralForCausalLM", "Gemma3ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM",
    "Qwen3_5ForCausalLM", "Qwen3NextForCausalLM", "Lfm2ForCausalLM",
]  # fmt: skip


def held(model, tokens):
    """Bytes that the cache holds of one row of this many tokens."""
    cache = empty_cache(model.base_model)
    model(input_ids=torch.arange(3, 3 + tokens)[None] % 40, use_cache=True, past_key_values=cache)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            tensors += getattr(layer, name, {}).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.filterwarnings("ignore:.*uses slower paths")
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_has_the_bytes_that_the_cache_holds(kind):
    """Latents of MLA, sliding windows of 8, recurrent states of a fixed size; all found on the meta device."""
    model = tiny(kind)
    described = ModelInfo("student", kind, "", None, model.config, model.generation_config)
    size = shape(described, "float32").cache
    for tokens in (3, 7, 20):
        assert size.of(tokens) == held(model, tokens)
    assert size.prefix == ways_of(model).cache_bytes  # whole rows, decompressed, as windows need them


def test_what_the_configuration_alone_would_give_is_another_size():
    """MLA keeps a latent of 16 and 8 rotary numbers per token and layer, not 4 heads of keys and values."""
    size = tried_cache(tiny("DeepseekV3ForCausalLM"))
    assert size.of(10) == 10 * 2 * (16 + 8) * 4
    assert size.prefix == 2 * 4 * (24 + 16) * 4
    sliding = tried_cache(tiny("MistralForCausalLM", sliding_window=8))
    assert sliding.of(1000) == sliding.of(7) == 7 * 2 * 2 * 2 * 16 * 4


def test_a_model_that_cannot_run_without_storage_has_the_formula(monkeypatch):
    config = LlamaConfig(vocab_size=47, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=16)
    described = ModelInfo("student", "", "", None, config, None)
    assert shape(described, "bfloat16").cache.of(5) == 5 * 2 * 3 * 64 * 2

    def reads_values(self, **_):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(LlamaModel, "forward", reads_values)
    again = ModelInfo("student", "", "", None, config, None)
    size = shape(again, "bfloat16").cache
    assert (size.layers, size.states, size.prefix) == (((2 * 3 * 64 * 2, math.inf),), 0.0, 2 * 3 * 64 * 2)
