"""Do student and teacher speak of the same tokens, and does the text fit their contexts?"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from topd.errors import ContextError, TokenizerMismatchError


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, show: int = 5) -> None:
    """Raise `TokenizerMismatchError`, naming tokens, unless every token has the same id in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    groups = {
        "only the student has": [f"{t!r} ({i})" for t, i in ours.items() if t not in theirs],
        "only the teacher has": [f"{t!r} ({i})" for t, i in theirs.items() if t not in ours],
        "different ids": [f"{t!r} ({i} and {theirs[t]})" for t, i in ours.items() if theirs.get(t, i) != i],
    }
    found = "; ".join(
        f"{what}: {', '.join(sorted(tokens)[:show])}{f' and {len(tokens) - show} more' if len(tokens) > show else ''}"
        for what, tokens in groups.items()
        if tokens
    )
    raise TokenizerMismatchError(
        f"Student and teacher do not share a tokenizer ({len(ours)} and {len(theirs)} tokens): {found}. "
        "The token loss compares probabilities token by token, so both must come from the same family; for different "
        "tokenizers use TRL's GOLDTrainer."
    )


def check_context(
    prompt_length: int, prompt: str, response_length: int, window_length: int, configs: Mapping[str, PreTrainedConfig]
) -> None:
    """Raise `ContextError` if prompt + response + window is longer than a model's context."""
    for role, config in configs.items():
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        needed = prompt_length + response_length + window_length
        if limit is not None and needed > limit:
            raise ContextError(
                f"A prompt of {prompt_length} tokens + max_completion_length {response_length} + window_length "
                f"{window_length} = {needed} tokens do not fit the {role}'s context of {limit}. Shorten or drop the "
                f"prompt, or lower max_completion_length or window_length. It begins: {prompt[:160]!r}."
            )
