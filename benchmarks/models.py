"""Random models and prompts, made in place: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from topd.embedded.task import make_problems
from topd.embedded.tokenizer import build_tokenizer


def tokenizer() -> PreTrainedTokenizerFast:
    """That of the embedded task: about 50 tokens. Models may have more; what they sample then decodes to nothing."""
    return build_tokenizer()


def random_model(
    vocabulary: int, width: int, layers: int, seed: int, scale: float = 3.0, positions: int = 4096
) -> Qwen3ForCausalLM:
    """A Qwen3 with tied embeddings, heads of 64 (32 in narrow ones), two queries to a key as the small Qwen3 have them.

    `scale` makes its distributions differ from uniform.
    """
    torch.manual_seed(seed)
    text = tokenizer()
    head = 64 if width % 128 == 0 else 32
    heads = width // head
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=head,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=text.pad_token_id,
        eos_token_id=text.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def prompts(count: int) -> list[str]:
    """Problems of the embedded task, some ten tokens each."""
    return [problem.prompt for problem in make_problems(count, 0, held_out=False)]
