"""Each model is tried once; what does not equal separate sequences is not used."""

import math

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from sweep import examine_states
from test_shared_prefix import SIZES
from tiny_architectures import tiny
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from topd.errors import ContextError
from topd.near_future import LocalModel
from topd.near_future.model_parts import backbone_of, output_head
from topd.near_future.self_check import Check
from topd.near_future.ways import (
    ACROSS_SWITCH,
    LOWERED,
    ArchitectureError,
    Ways,
    in_step_of,
    lengths_of,
    notice_of,
    ways_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*uses slower paths")
FAMILIES = {  # class: what is exact, of (windows over one prefix, guided windows in one row, left padding)
    "Qwen3ForCausalLM": (True, True, True),
    "GPT2LMHeadModel": (True, True, True),
    "GPTJForCausalLM": (False, False, True),
    "BloomForCausalLM": (False, False, True),
    "Llama4ForCausalLM": (False, False, True),
    "DeepseekV3ForCausalLM": (False, True, True),
    "GptOssForCausalLM": (False, False, True),
    "Qwen3_5ForCausalLM": (False, False, True),
    "RwkvForCausalLM": (False, False, False),
    "Gemma3nForCausalLM": (False, False, False),
    "DeepseekV32ForCausalLM": (False, False, True),
    "xLSTMForCausalLM": (False, False, False),
}


def scaled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_states_windows_and_gradients_equal_separate_sequences(name):
    model = tiny(name)
    ways = ways_of(model)
    assert (ways.shared_prefix > 0, ways.packed_rows > 0, ways.left_padding) >= FAMILIES[name]
    examine_states(model)


def test_left_padding_whose_gradients_are_not_finite_is_not_used():
    model = tiny("Gemma3nForCausalLM")
    with torch.no_grad():
        for module in model.modules():  # it takes the root of the padding token's embedding
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    ways = ways_of(model)
    assert (ways.left_padding, ways.trl) == (False, "without left padding")
    assert ways.reasons["left_padding"] == ways.reasons["trl"] == "gradients differ by nan"


def test_a_model_that_fails_in_training_mode_only_does_not_train():
    ways = ways_of(tiny("ReformerModelWithLMHead"))  # in training mode its rows must have one length
    assert not ways.trains
    assert "axial_pos_shape" in ways.reasons["trains"]


def test_experts_whose_config_asks_for_router_logits_keep_their_fast_paths():
    """As a supervised run saves it; transformers' load-balancing loss fails where `generate` has padded prompts."""
    model = tiny("Qwen3MoeForCausalLM", 0, output_router_logits=True)
    assert ways_of(model) == ways_of(tiny("Qwen3MoeForCausalLM", 0)) == Ways(cache_bytes=512.0)
    assert model.config.output_router_logits  # put back


def test_trying_a_model_takes_no_random_numbers():
    model = tiny("GPT2LMHeadModel", attn_pdrop=0.1, resid_pdrop=0.1)
    state = torch.get_rng_state()
    assert ways_of(model).trains
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_whose_generate_is_not_its_forward_pass_is_refused():
    with pytest.raises(ArchitectureError, match="does not generate what it computes"):
        ways_of(tiny("MoshiForCausalLM"))  # only its cache knows the sliding window


def test_a_model_that_reads_its_masks_takes_the_plain_way_and_the_reason_is_in_words():
    ways = ways_of(tiny("DeepseekV32ForCausalLM"))  # its indexer chooses tokens by the mask
    assert (ways.shared_prefix, ways.packed_rows, ways.left_padding) == (0, 0, True)
    assert "reads its attention masks itself" in ways.reasons["packed_rows"]


@pytest.mark.parametrize(
    "name",
    [
        "xLSTMForCausalLM",  # output_logit_soft_cap
        "RecurrentGemmaForCausalLM",  # logits_soft_cap
        "InklingForCausalLM",  # divided by logits_mup_width_multiplier
        "GraniteForCausalLM, multipliers",  # divided by logits_scaling
        "HyperCLOVAXForCausalLM, multipliers",  # multiplied by logits_scaling
    ],
)
@torch.no_grad()
def test_the_head_does_what_the_config_says_of_logits(name):
    model, ids = tiny(name), torch.arange(3, 13)[None]
    states = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(output_head(model).logits(states), model(input_ids=ids, use_cache=False).logits)


class ScaledHead(torch.nn.Linear):
    """A learned scale per token, as Dory's."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.rand(self.out_features) + 0.5)

    def forward(self, states):
        return super().forward(states) * self.logit_scale


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_with_a_forward_pass_of_its_own_is_in_the_loss_and_learns(lora):
    model, ids = tiny("LlamaForCausalLM"), torch.arange(3, 13)[None]
    model.lm_head = ScaledHead(*reversed(model.lm_head.weight.shape))
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    states = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    found = output_head(model).logits(states)
    torch.testing.assert_close(found, logits)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(each.log_softmax(-1)[..., 5].sum(), learned) for each in (found, logits)]
    torch.testing.assert_close(*gradients)
    assert ways_of(model) == ways_of(tiny("LlamaForCausalLM"))


def test_a_model_is_tried_once(monkeypatch):
    model = tiny("LlamaForCausalLM")
    assert ways_of(model) == Ways(cache_bytes=ways_of(model).cache_bytes)
    monkeypatch.setattr("topd.near_future.self_check.check_model", None)
    ways_of(model)


def test_a_model_under_accelerate_s_autocast_is_tried_in_its_own_dtype():
    model = tiny("LlamaForCausalLM")
    model._original_forward = model.forward
    model.forward = wrapped = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ways = ways_of(model)
    assert (ways.sampling_states, ways.left_padding, ways.reasons) == (math.inf, True, {})
    assert model.forward is wrapped


def test_a_prefix_takes_the_bytes_that_its_cache_has():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert ways_of(model).cache_bytes == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, float32


def test_a_long_sliding_window_is_tried_with_a_short_one_and_put_back(monkeypatch):
    torch.manual_seed(0)
    model = scaled(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)))
    tried = []

    def exact_below_the_window(check):
        tried.append(check.model.config.sliding_window)
        return "a token leaves the window" if check.model.config.sliding_window < 17 else None

    monkeypatch.setattr(Check, "_packed_rows", exact_below_the_window)
    with pytest.warns(UserWarning, match=r"longer than 64 tokens .*sliding_window = 64"):
        ways = ways_of(model)
    assert tried == [64, LOWERED]
    assert (ways.shared_prefix, ways.packed_rows, ways.sampling_states) == (math.inf, 64, math.inf)
    assert model.config.sliding_window == 64


def test_rows_beyond_a_limit_where_a_model_sees_later_tokens_are_refused():
    model = tiny("DogeForCausalLM", keep_window_size=20)
    assert ways_of(model).end == 20
    with pytest.raises(ContextError, match=r"longer than 20.*not causal"):
        LocalModel(model, 0, [1]).continue_([torch.arange(3, 19)], 5)
    with pytest.raises(ArchitectureError, match="not causal"):
        ways_of(tiny("DogeForCausalLM", keep_window_size=8))


def test_a_window_that_no_layer_uses_limits_nothing():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, sliding_window=64, layer_types=["full_attention"] * 2)
    model = scaled(Gemma3ForCausalLM(config))
    assert ways_of(model).shared_prefix == math.inf


def test_rows_on_both_sides_of_longrope_s_switch_run_apart():
    ways = Ways(switch=10)
    assert ways.together([8, 12, 9, 14], [4, 2, 5, 0]) == [[0, 2], [1, 3]]
    assert ways.together([8, 9], [1, 0], growth=1) == [[0, 1]]
    assert ways.together([8, 9, 8], [1, 0, 1], growth=5) == [[0, 2], [1]]


def test_rows_without_left_padding_run_by_length():
    assert Ways(left_padding=False).together([5, 7, 5], [2, 0, 2]) == [[0, 2], [1]]


def test_a_model_that_mixes_the_rows_of_a_batch_decodes_one_at_a_time():
    """RWKV of transformers does while it decodes with its state, whatever the lengths."""
    model = tiny("RwkvForCausalLM")
    with pytest.warns(UserWarning, match="windows are generated one at a time .*not the model's own"):
        assert not ways_of(model).batches
    prefixes = [torch.arange(3, 9), torch.arange(20, 26)]
    source = LocalModel(model, 0, [])
    for prefix, tokens in zip(prefixes, source.continue_(prefixes, 8).tokens, strict=True):
        ids = prefix[None]
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert tokens.tolist() == ids[0, len(prefix) :].tolist()


def longrope():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    return tiny(
        "Phi3ForCausalLM", max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
    )  # fmt: skip


@pytest.mark.skipif(Version(transformers.__version__) < ACROSS_SWITCH, reason="generate of transformers is wrong there")
def test_longrope_beyond_the_switch_is_exact():
    model = longrope()
    assert ways_of(model).switch == 16
    examine_states(model)


def test_longrope_beyond_the_switch_is_refused_where_generate_is_wrong(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    model = longrope()
    with pytest.raises(ContextError, match=r"longer than 16.*for LongRoPE transformers 5\.20 or later"):
        examine_states(model)
    source = LocalModel(model, 0, [1])
    assert len(source.continue_([torch.arange(3, 13)], 5)) == 1


def test_dynamic_ntk_beyond_its_context_is_refused():
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = scaled(LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 20}, rope_parameters=rope)))
    assert lengths_of(model).end == 20
    source = LocalModel(model, 0, [1])
    assert len(source.continue_([torch.arange(3, 13)], 5)) == 1
    with pytest.raises(ContextError, match="longer than 20"):
        source.continue_([torch.arange(3, 23)], 5)


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ArchitectureError, match=r"not causal.*is_decoder"):
        ways_of(tiny("BertLMHeadModel", is_decoder=False))


def test_a_head_that_does_more_is_refused():
    model = tiny("LlamaForCausalLM")
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits.square()))
    with pytest.raises(ArchitectureError, match="output head"):
        ways_of(model)


def test_processes_in_step_make_no_choice_by_length():
    ways = Ways(shared_prefix=64, packed_rows=math.inf)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=47))
    assert in_step_of(model, ways) == Ways(shared_prefix=0)
    with pytest.raises(ArchitectureError, match="DDP"):
        in_step_of(model, Ways(left_padding=False))


def test_the_notice_says_what_is_slower_and_why():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=47))
    assert notice_of(model, Ways()) is None
    reasons = {"packed_rows": "sliding_window = 4,096"}
    notice = notice_of(model, Ways(shared_prefix=0, packed_rows=4096, reasons=reasons))
    assert notice == (
        "GPT2LMHeadModel uses slower paths, which give the same results: windows are generated from fresh prefixes "
        "(not exact otherwise); each guided window runs after its own copy of the prefix where a row is "
        "longer than 4,096 tokens (sliding_window = 4,096)."
    )
