"""Small random models whose attention is not plain softmax attention over everything before."""

import torch
import transformers

SIZES = {
    "vocab_size": 47, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ATTENTION = {  # name: (config, model, options); sliding windows of 8 tokens
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granite-swa": (
        "GraniteSWAConfig",
        "GraniteSWAForCausalLM",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek-v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", LATENT | EXPERTS),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT | EXPERTS),
}
RECURRENT = {
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        LINEAR
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "falcon-h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16},
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 8},
    ),
}


def special_model(kind):
    """In evaluation mode, and sharper than random, so that a wrong mask, position or state shows."""
    config, model, options = (ATTENTION | RECURRENT)[kind]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**SIZES | options)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.mul_(2.5)
            if name.endswith("sinks"):
                parameter.normal_()
    return built
