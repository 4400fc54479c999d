"""A tiny random model of every causal language model class that the installed transformers can build.

Sizes are set by the names of config entries; a few classes need more (`MORE`). Weights are scaled up and biases are
random, so that a wrong mask, position or scale shows in the states.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH = 47, 64
SIZES: list[tuple[str, Any]] = [  # the first pattern that matches the whole name wins
    (r"(decoder_|unpadded_)?vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (
        r"hidden_size(_global)?|d_model|n_embd|dim|emb_dim|embed_dim|word_embed_proj_dim|(input_|output_)?embedding_size",
        WIDTH,
    ),
    (r"attention_hidden_size|lru_width|embedding_dim|moe_latent_size", WIDTH),
    (r"num_(hidden|decoder|encoder)?_?layers|n_layers?|(decoder|encoder)_layers|num_blocks", 2),
    (r"num_(decoder_|encoder_)?attention_heads|n_heads?|num_heads|(decoder_|encoder_)?attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"head_dim|attention_head_dim|global_head_dim|dim_head|kv_channels", 16),
    (r"(intermediate|feed_forward)_size|(decoder_|encoder_)?ffn_dim|n_inner|dff|dim_ff|d_ff|ffn_hidden_size", 96),
    (r"mlp_dim|dense_intermediate_size|intermediate_size_mlp|intermediate_multiple_size", 96),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length", 128),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim|linear_((key|value)_)?head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_experts_per_layer", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r".*(moe|expert).*intermediate_size|expert_ffn_hidden_size|shared_intermediate_size", 32),
    (
        r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|first_k_dense_replace|num_dense_layers",
        1,
    ),
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|keep_window_size|index_topk", 8),
    (r"local_attention_window_len|local_attention", 8),
    (r"index_n_heads", 16),  # scores that every head rectifies to 0 tie, and which of them are kept is chance
    (r"linear_num_((key|value)_)?heads|n_mamba_heads", 2),
    (r"(mamba_)?(n|num)_heads|mamba_(n|num)_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_ssm", 128),
    (r"(mamba_)?n_?groups|mamba_ngroups", 1),
    (r"mamba_d_state|ssm_state_size|state_size", 16),
    (r"(mamba_)?chunk_size", 8),
    (r"mamba_dt_rank|time_step_rank", 8),
    (r"hidden_size_per_layer_input", 16),
    (r"pad_token_id", 0),
    (r"eos_token_id", 1),
    (r"bos_token_id", 2),
    (r".*(dropout|pdrop).*", 0.0),
    (r"is_decoder", True),
]
ZAMBA = {  # its shared block reads the embeddings beside the states, and is in two layers at least
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
    "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 32,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MORE: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DoryForCausalLM": {  # its middle layers run twice
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Dots3NoteForCausalLM": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "GPTNeoForCausalLM": {
        "attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"], "window_size": 8,
    },
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0],
    },
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashForCausalLM": {"head_dim": 8},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MinistralForCausalLM": {"head_dim": 16},
    "MptForCausalLM": {"attn_config": {"alibi": True}},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "RoCBertForCausalLM": {
        "shape_vocab_size": 47, "pronunciation_vocab_size": 47, "shape_embed_dim": 16, "pronunciation_embed_dim": 16,
    },
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 64},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": ZAMBA | {"n_mamba_heads": 8},
    "ZambaForCausalLM": ZAMBA,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128, "autocast_kernel_dtype": "float32"},
}  # fmt: skip
"""What single classes need beyond that."""

LONGROPE = ROPE | {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = ROPE | {"rope_type": "dynamic", "factor": 2.0}
MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
MIXED = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "CohereForCausalLM, norms of queries and keys": {"use_qk_norm": True},
    "DeepseekV3ForCausalLM, full-rank queries": {"q_lora_rank": None},
    "DogeForCausalLM, rows within keep_window_size": {"keep_window_size": 64},
    "FalconForCausalLM, ALiBi": {"alibi": True},
    "FalconForCausalLM, new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconH1ForCausalLM, multipliers": {
        "lm_head_multiplier": 0.5, "embedding_multiplier": 3.0, "key_multiplier": 0.6, "attention_out_multiplier": 0.7,
    },
    "GPT2LMHeadModel, scores by layer": {"scale_attn_by_inverse_layer_idx": True},
    "GPTNeoXForCausalLM, layers in sequence": {"use_parallel_residual": False},
    "Gemma2ForCausalLM, eager": {"attn_implementation": "eager"},
    "Gemma2ForCausalLM, no soft caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "Gemma3ForCausalLM, soft caps": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    "GlmForCausalLM, a quarter rotary": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}},
    "GptOssForCausalLM, sinks without a window": {"layer_types": ["full_attention"] * 2},
    "GraniteForCausalLM, multipliers": MULTIPLIED | {"logits_scaling": 2.5},
    "HyperCLOVAXForCausalLM, multipliers": MULTIPLIED | {"logits_scaling": 2.5},
    "LlamaForCausalLM, biases": {"attention_bias": True, "mlp_bias": True},
    "LlamaForCausalLM, dynamic NTK, all rows short": {"rope_parameters": DYNAMIC},
    "LlamaForCausalLM, dynamic NTK, rows beyond its context": {
        "rope_parameters": DYNAMIC, "max_position_embeddings": 20,
    },
    "LlamaForCausalLM, eager": {"attn_implementation": "eager"},
    "LlamaForCausalLM, linear RoPE": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    "LlamaForCausalLM, llama3 RoPE": {
        "rope_parameters": ROPE | {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "LlamaForCausalLM, one key-value head": {"num_key_value_heads": 1},
    "LlamaForCausalLM, tied head": {"tie_word_embeddings": True},
    "LlamaForCausalLM, YaRN": {
        "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "MistralForCausalLM, no window": {"sliding_window": None},
    "MistralForCausalLM, a window of one row": {"sliding_window": 20},
    "MoshiForCausalLM, rows within the window": {"sliding_window": 64},
    "NemotronForCausalLM, a quarter rotary": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}},
    "OPTForCausalLM, norms behind, narrow embeddings": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "OlmoForCausalLM, clipped": {"clip_qkv": 0.5},
    "Phi3ForCausalLM, LongRoPE, rows beyond the switch": {
        "rope_parameters": LONGROPE, "original_max_position_embeddings": 16,
    },
    "PhiForCausalLM, norms of queries and keys": {"qk_layernorm": True},
    "Qwen2ForCausalLM, window in some layers": MIXED | {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen3MoeForCausalLM, dense and routed layers": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "Starcoder2ForCausalLM, untied head": {"tie_word_embeddings": False},
    "XLMWithLMHeadModel, causal": {"causal": True},
}  # fmt: skip
"""Entries of a config that its defaults leave out, by class and what they change."""


def classes() -> list[str]:
    """Names of all classes, without those that take pictures or sound, and drafts that read another model's cache."""
    others = ("ConditionalGeneration", "Assistant")
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return sorted(name for name in names if not any(other in name for other in others))


def subjects() -> list[str]:
    """All classes and variants."""
    return sorted([*classes(), *VARIANTS])


def class_of(subject: str) -> Any:
    return getattr(transformers, subject.split(",")[0])


def tiny_config(subject: str, **options: Any) -> Any:
    """The config of a class or variant with everything small."""
    cls = class_of(subject).config_class
    options = MORE.get(subject.split(",")[0], {}) | VARIANTS.get(subject, {}) | options
    try:
        usual = cls()
    except Exception:
        usual = cls(**options)
    return cls(**(shrunk(usual) | options))


def shrunk(usual: Any) -> dict[str, Any]:
    """The entries of a config that set sizes, set small; of configs inside it likewise."""
    entries: dict[str, Any] = {}
    for name, value in vars(usual).items():
        if isinstance(value, PreTrainedConfig):
            entries[name] = type(value)(**shrunk(value))
        if name.startswith("_") or value is None or isinstance(value, bool) != (name == "is_decoder"):
            continue
        small = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if small is not None and (isinstance(value, (int, float)) or (isinstance(value, list) and "token" in name)):
            entries[name] = type(value)(small) if isinstance(value, (int, float)) else small
    if "qk_rope_head_dim" in entries and "qk_nope_head_dim" in entries:
        entries.pop("head_dim", None)  # latent attention derives it
    every_head = vars(usual).get("num_key_value_heads") == vars(usual).get("num_attention_heads")
    if every_head and "num_key_value_heads" in entries:
        entries["num_key_value_heads"] = 4
    kinds = vars(usual).get("layer_types")
    if kinds:
        distinct = list(dict.fromkeys(kinds))
        entries["layer_types"] = distinct if len(distinct) > 1 else distinct * 2
        for name in ("num_hidden_layers", "n_layer"):
            if name in entries:
                entries[name] = len(entries["layer_types"])
    return entries


def tiny(subject: str, seed: int = 0, **options: Any) -> Any:
    """A model of a class or variant, in evaluation mode."""
    config, cls = tiny_config(subject, **options), class_of(subject)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in cls(config).parameters())
    assert parameters < 5e6, f"{cls.__name__} is not tiny: {parameters:,} parameters"
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():  # a padding token of zeros makes exact ties in routers and indexers
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.05 * torch.randn_like(module.weight[0])
    return model
