"""Models by name: whole ones, LoRA adapters merged into their base, and pairs with one tokenizer and equal heads."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError
from topd.loading.adapters import ADAPTER_CONFIG, base_of, is_adapter, merged, weights_of
from topd.loading.by_name import SAFE, load_by_name
from topd.loading.tokenizers import tokenizer_of


def loaded_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model (in evaluation mode, on the best device) and tokenizer, from safetensors only, without custom code.

    `name`: embedded model, Hub name, folder, or folder of an adapter (peft), which is merged into its base. `dtype`: of
    the weights, or of that base.

    Raises:
        TOPDError: something cannot be loaded.
    """
    folder = resolve_model(name)
    if is_adapter(folder):
        tokenizer, model = _adapter(folder, dtype)
    else:
        tokenizer, model = tokenizer_of(folder), load_weights(folder, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _adapter(folder: str, dtype: str) -> tuple[Any, Any]:
    """The adapter's tokenizer, or else its base's, and the base with the adapter merged into it."""
    tokenizer, base = tokenizer_of(folder), base_of(folder)
    try:
        model = load_weights(base, dtype)
    except TOPDError as error:
        raise TOPDError(
            f"The adapter in {folder} belongs to {base}, which cannot be loaded: {error} Correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}."
        ) from error
    return tokenizer, merged(model, folder)


def load_weights(name: str, dtype: Any = "auto", **options: Any) -> Any:
    """A whole model, as `from_pretrained` returns it; see `loaded_model`. `options` override the defaults."""
    defaults = SAFE | {"dtype": dtype, "trust_remote_code": False}
    return load_by_name("models", name, AutoModelForCausalLM.from_pretrained, name, **defaults | options)


def load_config(folder: str, **options: Any) -> Any:
    """A model's config, of an adapter its base's, without its weights."""
    return load_by_name("config", folder, AutoConfig.from_pretrained, weights_of(folder), **options)


def model_to_train(role: str, model: Any) -> Any:
    """A student or teacher as a trainer takes it: embedded names become folders; loaded models are unchanged.

    Raises:
        TOPDError: it is the folder of an adapter that cannot be loaded, as far as this is known without weights.
    """
    if not isinstance(model, str | os.PathLike):
        return model
    name = resolve_model(os.fspath(model))
    weights_of(name)
    return name


def names_of(**models: Any) -> dict[str, str | None]:
    """The names of models that were given by name."""
    named = {role: os.fspath(model) for role, model in models.items() if isinstance(model, str | os.PathLike)}
    return dict.fromkeys(models) | named
