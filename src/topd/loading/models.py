"""Models by name: whole ones, LoRA adapters merged into their base, and pairs with one tokenizer and equal heads."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError, install
from topd.loading.by_name import SAFE, load_by_name
from topd.loading.tokenizers import tokenizer_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def loaded_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model (in evaluation mode, on the best device) and tokenizer, from safetensors only, without custom code.

    Args:
        name: embedded model, Hub name, folder, or folder of an adapter (peft).
        dtype: of the weights; for an adapter, of the base into which it is merged.

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
    base, tokenizer = resolve_model(base_of(folder)), None
    if (Path(folder) / "tokenizer_config.json").is_file():
        try:
            tokenizer = tokenizer_of(folder)
        except TOPDError as error:
            raise TOPDError(
                f"{error} This is the adapter's own tokenizer: without a tokenizer_config.json there, that of its base "
                f"{base} is used."
            ) from error
    try:
        if tokenizer is None:
            tokenizer = tokenizer_of(base)
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
    """A model's config, without its weights."""
    return load_by_name("config", folder, AutoConfig.from_pretrained, folder, **options)


def save_merged(adapter: str, out: str, dtype: str = "auto") -> None:
    """Save an adapter merged into its base, and its tokenizer: a whole model, which training takes."""
    for each in loaded_model(adapter, dtype):
        each.save_pretrained(out)


def check_whole(role: str, name: str) -> None:
    """Raise `TOPDError` if a student or teacher is a folder with an adapter only. Loads no weights."""
    folder = Path(name)
    if not is_adapter(name) or (folder / "config.json").is_file():  # transformers then reads a whole model
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
    """A student or teacher as a trainer takes it: embedded names become folders, folders of adapters are refused."""
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
    """The base model of an adapter, after checks that need no weights."""
    if importlib.util.find_spec("peft") is None:
        raise TOPDError(f"{folder} holds an adapter, which needs peft: {install('peft')}.")
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise TOPDError(
            f"{folder} holds an adapter without {ADAPTER_WEIGHTS}, the only format that is read. Save it again with "
            "peft's save_pretrained."
        )
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise TOPDError(f"{folder}/{ADAPTER_CONFIG} has no base_model_name_or_path; add it.")
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
        return merged_adapter(with_adapter).requires_grad_(True)  # peft has frozen the base
    except TOPDError as error:
        raise TOPDError(f"The adapter in {folder}: {error}") from error


LARGEST_CHANGE = 0.1
"""Largest mean change of the logits, in units of their standard deviation, that a merge may cause. Our choice: rounding
in bfloat16 gives about 0.01, a wrong merge 1 or more."""


def merged_adapter(adapted: Any, check: bool = True) -> Any:
    """The base model with the adapter's weights merged into its own.

    Embeddings and output head of many models are one tensor. An adapter on one of them must not change the other, so
    the head is copied before the merge, and the merged model is untied.

    Args:
        adapted: a PEFT model.
        check: compare the logits before and after, with two forward passes over 16 tokens. Needs unsharded weights.

    Raises:
        TOPDError: the adapter cannot be merged, or the merged model computes something else.
    """
    if not hasattr(adapted, "merge_and_unload"):
        raise TOPDError("This kind of adapter cannot be merged into its base; LoRA adapters can.")
    before = _logits(adapted) if check else None
    untie_adapted_head(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    if before is not None:
        change = float((_logits(merged) - before).abs().mean() / before.std())
        if not change <= LARGEST_CHANGE and not getattr(merged, "is_quantized", False):
            raise TOPDError(
                f"The merged model does not compute what the model with its adapter computes: the logits change by "
                f"{change:.2g} of their spread on average. Train an adapter that does not target embed_tokens, lm_head "
                "or modules_to_save, or serve the adapter without merging it."
            )
    return merged


def untie_adapted_head(base: Any) -> None:
    """Copy the output head's weight if it is tied to the embeddings and an adapter is on either; in place."""
    layers = base.get_output_embeddings(), base.get_input_embeddings()
    head, embeddings = map(_without_adapter, layers)
    adapted = head is not layers[0] or embeddings is not layers[1]
    if not adapted or getattr(head, "weight", None) is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _without_adapter(layer: Any) -> Any:
    """The base's layer inside PEFT's wrappers."""
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    return layer


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """[position, vocabulary] logits of 16 token ids spread over the vocabulary, in evaluation mode."""
    device, rows = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    logits: Tensor = model(input_ids=torch.linspace(0, rows - 1, 16, device=device).long()[None]).logits[0].float()
    model.train(was_training)
    return logits
