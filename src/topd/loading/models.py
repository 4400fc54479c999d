"""Models by name: whole ones, and LoRA adapters merged into their base."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError
from topd.loading.adapters import base_of, is_adapter, merged, of_another_base, weights_of
from topd.loading.by_name import SAFE, load_by_name
from topd.loading.tokenizers import tokenizer_of


def loaded_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model (in evaluation mode, on the best device) and tokenizer, from safetensors only, without custom code.

    `name`: embedded model, Hub name, folder, or folder of an adapter (peft), which is merged into its base. `dtype`: of
    the weights, or of that base. Raises `TOPDError` where something cannot be loaded.
    """
    folder = resolve_model(name)
    tokenizer = tokenizer_of(folder)
    if is_adapter(folder):
        base = base_of(folder)
        try:
            model = load_weights(base, dtype)
        except TOPDError as error:
            raise of_another_base(folder, base, error) from error
        model = merged(model, folder)
    else:
        model = load_weights(folder, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_weights(name: str, dtype: Any = "auto", **options: Any) -> Any:
    """A whole model, as `from_pretrained` returns it; see `loaded_model`. `options` override the defaults."""
    defaults = SAFE | {"dtype": dtype, "trust_remote_code": False}
    return load_by_name("models", name, AutoModelForCausalLM.from_pretrained, name, **defaults | options)


def load_config(folder: str, **options: Any) -> Any:
    """A model's config, of an adapter its base's, without its weights."""
    return load_by_name("config", folder, AutoConfig.from_pretrained, weights_of(folder), **options)


def model_to_train(role: str, model: Any) -> Any:
    """A student or teacher as a trainer takes it: embedded names become folders; loaded models are unchanged.

    Raises `TOPDError` for an adapter that cannot be loaded, as far as this is known without weights.
    """
    if not isinstance(model, str | os.PathLike):
        return model
    name = resolve_model(os.fspath(model))
    weights_of(name)
    return name


def names_of(**models: Any) -> dict[str, str | None]:
    """The names of models that were given by name."""
    return {role: os.fspath(m) if isinstance(m, str | os.PathLike) else None for role, m in models.items()}
