"""Whether student and teacher share a tokenizer, and whether text fits their contexts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from topd.errors import ContextError, TokenizerMismatchError, TOPDError
from topd.loading.adapters import base_of, is_adapter, of_another_base
from topd.loading.by_name import load_by_name

FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which a folder with a tokenizer has at least one."""


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise `TokenizerMismatchError`, naming tokens, unless every token has the same id in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    groups = {
        "only the student has": [f"{t!r} ({i})" for t, i in ours.items() if t not in theirs],
        "only the teacher has": [f"{t!r} ({i})" for t, i in theirs.items() if t not in ours],
        "different ids": [f"{t!r} ({i} and {theirs[t]})" for t, i in ours.items() if theirs.get(t, i) != i],
    }
    found = "; ".join(f"{what}: {_some(sorted(tokens))}" for what, tokens in groups.items() if tokens)
    raise TokenizerMismatchError(
        f"Student and teacher do not share a tokenizer ({len(ours)} and {len(theirs)} tokens): {found}. "
        "The token loss compares probabilities token by token, so both must come from the same family; for different "
        "tokenizers use TRL's GOLDTrainer."
    )


def _some(shown: list[str]) -> str:
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def compare_tokenizers(ours: Any, teacher: Any, trust_remote_code: bool, revision: str | None) -> str | None:
    """Raise `TokenizerMismatchError` if the teacher's tokenizer differs; return a note if it cannot be found.

    `teacher`: a name, or a loaded model, whose tokenizer is loaded from where the model came from.
    """
    theirs = tokenizer_of(teacher, trust_remote_code, revision)
    if theirs is not None:
        check_tokenizers(ours, theirs)
        return None
    return (
        "The tokenizers were not compared: the teacher's is unknown, because the loaded model does not name a folder "
        "with one. Make sure that both models were trained with the same tokenizer."
    )


def tokenizer_of(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> Any | None:
    """The tokenizer of a name, or of the folder or Hub name that a loaded model came from (None if there is none).

    Raises `TOPDError` if the name has no tokenizer.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if isinstance(model, str):
        options |= {"revision": revision} if revision else {}
        if is_adapter(model):
            return _of_adapter(model, options)
        empty = Path(model).is_dir() and not any(path for name in FILES for path in Path(model).glob(name))
        tokenizer = None if empty else load_by_name("tokenizer", model, AutoTokenizer.from_pretrained, **options)
        if tokenizer is None or not _has_vocabulary(tokenizer):
            raise TOPDError(f"{model} contains no tokenizer. Save the model's own: tokenizer.save_pretrained(...).")
        return tokenizer
    name = getattr(model.config, "_name_or_path", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options) if name else None
    except Exception:  # a folder without one, a Hub name without a network
        return None
    return tokenizer if tokenizer is not None and _has_vocabulary(tokenizer) else None


def _of_adapter(folder: str, options: dict[str, Any]) -> Any:
    """The tokenizer in an adapter's folder, or else its base's."""
    base, own = base_of(folder), (Path(folder) / "tokenizer_config.json").is_file()
    try:
        return load_by_name("tokenizer", folder if own else base, AutoTokenizer.from_pretrained, **options)
    except TOPDError as error:
        if not own:
            raise of_another_base(folder, base, error) from error
        raise TOPDError(
            f"{error} This is the adapter's own tokenizer: without a tokenizer_config.json there, that of its base "
            f"{base} is used."
        ) from error


def _has_vocabulary(tokenizer: Any) -> bool:
    """False for the tokenizer of special tokens only that transformers makes for a folder without one."""
    return not set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder)


def check_rows(tokenizer: Any, ours: int, theirs: int) -> str | None:
    """Check that both output heads have a row for every token; return a note if only added tokens have none.

    `ours`, `theirs`: rows of the student's and of the teacher's head; the larger one is cut to the smaller. Raises
    `TokenizerMismatchError` if the student would be cut below its tokenizer, or tokens of the vocabulary have no row.
    """
    kept = min(ours, theirs)
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= kept}
    if not beyond:
        return None
    shown = [f"{token!r} ({i})" for token, i in sorted(beyond.items(), key=lambda item: item[1])]
    found = (
        f"The {'teacher' if theirs < ours else 'student'}'s output head has {kept:,} rows, and the student's tokenizer "
        f"has tokens beyond: {_some(shown)}"
    )
    if theirs < ours or not set(beyond.values()) <= set(tokenizer.added_tokens_decoder):
        raise TokenizerMismatchError(
            f"{found}. Use the tokenizer that the models were trained with, or a pair of one family; tokens that you "
            "added need a row in both models (resize_token_embeddings), and must be trained in both."
        )
    return f"{found}. Prompts must not contain them."


def check_context(
    prompt_length: int, prompt: str, response_length: int, window_length: int, configs: Mapping[str, PreTrainedConfig],
    limited_by: str = "max_completion_length", what: str = "A prompt of",
) -> None:  # fmt: skip
    """Raise `ContextError` if prompt + response + window is longer than a model's context.

    `configs`: by the model's role, for the message, which begins with `what` and names `limited_by`, the option that
    sets the response length.
    """
    for role, config in configs.items():
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        needed = prompt_length + response_length + window_length
        if limit is not None and needed > limit:
            window = f" + window_length {window_length}" if window_length else ""
            room = limit - prompt_length - window_length
            lower = [f"lower {limited_by} to at most {room}"] * (room > 0) + ["lower window_length"] * bool(window)
            raise ContextError(
                f"{what} {prompt_length} tokens + {limited_by} {response_length}{window} = {needed} tokens do not "
                f"fit the {role}'s context of {limit}. {', or '.join(['Shorten or drop the prompt', *lower])}. It "
                f"begins: {prompt[:160]!r}."
            )
