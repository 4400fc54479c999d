"""Models by name, for commands that run them: whole ones, and LoRA adapters merged into their base."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError
from topd.loading.adapters import merged_adapter
from topd.loading.by_name import SAFE, load_by_name

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def loaded_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model, in evaluation mode on the best device, and tokenizer; from safetensors only, running no code of its own.

    Args:
        name: embedded one, Hub name, folder, or folder of an adapter (peft).
        dtype: of the weights; of an adapter's base, into which it is merged.

    Raises:
        TOPDError: something cannot be loaded.
    """
    folder = resolve_model(name)
    if is_adapter(folder):
        tokenizer, model = _adapter(folder, dtype)
    else:
        tokenizer, model = _tokenizer(folder), _model(folder, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _adapter(folder: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer, its own or else its base's, and the base with the adapter merged into it."""
    base, tokenizer = resolve_model(base_of(folder)), None
    if (Path(folder) / "tokenizer_config.json").is_file():
        try:
            tokenizer = _tokenizer(folder)
        except TOPDError as error:
            raise TOPDError(
                f"{error} This one is the adapter's own: without a tokenizer_config.json there, that of its base "
                f"{base} is taken."
            ) from error
    try:
        if tokenizer is None:
            tokenizer = _tokenizer(base)
        model = _model(base, dtype)
    except TOPDError as error:
        raise TOPDError(
            f"The adapter in {folder} belongs to {base}, which cannot be loaded: {error} Write where it is into "
            f"base_model_name_or_path of {ADAPTER_CONFIG}."
        ) from error
    return tokenizer, merged(model, folder)


def _tokenizer(name: str) -> Any:
    return load_by_name("tokenizer", name, AutoTokenizer.from_pretrained, trust_remote_code=False)


def _model(name: str, dtype: str) -> Any:
    return load_by_name(
        "models", name, AutoModelForCausalLM.from_pretrained, name, dtype=dtype, trust_remote_code=False, **SAFE
    )


def save_merged(adapter: str, out: str, dtype: str = "auto") -> None:
    """Write an adapter merged into its base, and its tokenizer: a whole model, as training takes it."""
    for each in loaded_model(adapter, dtype):
        each.save_pretrained(out)


def check_whole(role: str, name: str) -> None:
    """Raise `TOPDError` where a model to train, or its teacher, is the folder of an adapter alone. Loads no weights."""
    folder = Path(name)
    if not is_adapter(name) or (folder / "config.json").is_file():  # with both, transformers reads a whole model
        return
    whole = f"{folder}-merged"
    program = (
        f"from topd.loading.models import save_merged; save_merged({json.dumps(str(folder))}, {json.dumps(whole)})"
    )
    adapters = " (with --use_peft true, to train a new adapter on it)" if role == "student" else ""
    raise TOPDError(
        f"{folder} holds an adapter of {base_of(name)}; the {role} must be a whole model. Merge it once, then name "
        f"{whole}{adapters}:\n  python -c {shlex.quote(program)}"
    )


def model_to_train(role: str, model: Any) -> Any:
    """A student or teacher as a trainer takes it: embedded names become folders, adapters' folders are refused."""
    if not isinstance(model, str | os.PathLike):
        return model
    check_whole(role, os.fspath(model))
    return resolve_model(os.fspath(model))


def names_of(**models: Any) -> dict[str, str | None]:
    """The names of models that were given by name."""
    named = {role: os.fspath(model) for role, model in models.items() if isinstance(model, str | os.PathLike)}
    return dict.fromkeys(models) | named


def is_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def base_of(folder: str) -> str:
    """The model that an adapter belongs to, after checks that need no weights."""
    if importlib.util.find_spec("peft") is None:
        raise TOPDError(f"{folder} holds an adapter, which needs peft: pip install 'topd[peft]'.")
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise TOPDError(
            f"{folder} holds an adapter without {ADAPTER_WEIGHTS}; nothing else is read. Save it again with peft's "
            "save_pretrained."
        )
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise TOPDError(
            f"{folder}/{ADAPTER_CONFIG} does not say which base_model_name_or_path it belongs to; write it."
        )
    return base


def merged(model: Any, folder: str) -> Any:
    """The base with the adapter's weights added to its own."""
    from peft import PeftModel

    try:
        with_adapter: Any = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:  # other shapes, another kind of layer
        reason = " ".join(str(error).split())[:200]
        raise TOPDError(
            f"The adapter in {folder} does not fit its base {model.config._name_or_path}: {reason}"
        ) from error
    try:
        return merged_adapter(with_adapter).requires_grad_(True)  # as any other model: peft has frozen the base
    except TOPDError as error:
        raise TOPDError(f"The adapter in {folder}: {error}") from error
