"""Adapters of PEFT: their folders, how they are put on a base, and how they are merged into it."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError, install
from topd.near_future.model_parts import evaluating

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(name: Any) -> bool:
    """Whether this names a folder with an adapter only; with a config.json, transformers reads a whole model there."""
    if not isinstance(name, str | os.PathLike):
        return False
    return (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").is_file()


def base_of(folder: str) -> str:
    """The base model of an adapter, as `from_pretrained` takes it, after checks that need no weights."""
    if importlib.util.find_spec("peft") is None:
        raise TOPDError(f"{folder} contains an adapter, which needs peft: {install('peft')}.")
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise TOPDError(
            f"{folder} contains an adapter without {ADAPTER_WEIGHTS}, the only format that is read. Save it again with "
            "peft's save_pretrained."
        )
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise TOPDError(f"{folder}/{ADAPTER_CONFIG} has no base_model_name_or_path; add it.")
    return resolve_model(base)


def of_another_base(folder: str, base: str, error: TOPDError) -> TOPDError:
    """For an adapter whose base cannot be used."""
    return TOPDError(
        f"The adapter in {folder} belongs to {base}, which cannot be loaded: {error} Correct base_model_name_or_path "
        f"in {ADAPTER_CONFIG}."
    )


def config_of(folder: str) -> Any:
    """The adapter's own config (`peft.PeftConfig`)."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(folder)


def weights_of(name: str) -> str:
    """Where a model's config and whole weights are, as `from_pretrained` takes it: of an adapter, its base."""
    return base_of(name) if is_adapter(name) else resolve_model(name)


def with_adapter(base: Any, folder: str, *, trained: bool = False) -> Any:
    """The base (changed in place) with the adapter of a folder, unmerged. The base's weights are frozen.

    `trained`: whether the adapter's own weights require gradients. Raises `TOPDError` if the adapter does not fit the
    base, or is no adapter of weights (prompt tuning).
    """
    from peft import PeftModel

    try:
        learned_prompt = config_of(folder).is_prompt_learning
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # the loaded weights replace random ones
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted: Any = base if learned_prompt else PeftModel.from_pretrained(base, folder, is_trainable=trained)
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:  # other shapes, another kind of layer
        reason = " ".join(str(error).split())[:200]
        raise TOPDError(
            f"The adapter in {folder} does not fit its base {base.config._name_or_path}: {reason}"
        ) from error
    if learned_prompt:
        raise TOPDError(f"The adapter in {folder} is a learned prompt; LoRA and other adapters of weights work.")
    return adapted


def merged(model: Any, folder: str, check: bool = True) -> Any:
    """The base with the adapter's weights added to its own. See `merged_adapter`."""
    try:
        whole = merged_adapter(with_adapter(model, folder), check)
        for parameter in whole.parameters():  # peft has frozen the base
            parameter.requires_grad_(parameter.is_floating_point())  # packed weights of 4 or 8 bits have no gradient
        return whole
    except TOPDError as error:
        raise error if f" {folder} " in str(error) else TOPDError(f"The adapter in {folder}: {error}") from error


LARGEST_CHANGE = 0.1
"""Largest mean change of the logits, in units of their standard deviation, that a merge may cause. Our choice: rounding
in bfloat16 gives about 0.01, a wrong merge 1 or more."""


def merged_adapter(adapted: Any, check: bool = True) -> Any:
    """The base model of a PEFT model, with the adapter's weights merged into its own.

    Embeddings and output head of many models are one tensor. An adapter on one of them must not change the other, so
    the head is copied before the merge, and the merged model is untied. `check` compares the logits before and after,
    with two forward passes over 16 tokens; it needs unsharded weights. Raises `TOPDError` if the adapter cannot be
    merged, or the merged model computes something else.
    """
    if not hasattr(adapted, "merge_and_unload"):
        raise TOPDError("This kind of adapter cannot be merged into its base; LoRA adapters can.")
    before = _logits(adapted, "model with its adapter") if check else None
    untie_adapted_head(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    if before is not None:
        change = float((_logits(merged, "merged model") - before).abs().mean() / before.std())
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
    head, embeddings = map(without_wrappers, layers)
    adapted = head is not layers[0] or embeddings is not layers[1]
    if not adapted or getattr(head, "weight", None) is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def without_wrappers(layer: Any) -> Any:
    """The base's layer inside PEFT's wrappers."""
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    return layer


@torch.no_grad()
def _logits(model: Any, what: str) -> Tensor:
    """[position, vocabulary] logits of 16 token ids spread over the vocabulary, in evaluation mode.

    Raises `TOPDError`, for what is NaN or infinite.
    """
    device, rows = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    with evaluating(model):
        logits: Tensor = model(input_ids=torch.linspace(0, rows - 1, 16, device=device).long()[None]).logits[0]
    if not logits.isfinite().all():
        raise TOPDError(
            f"The {what} computes NaN or infinite logits. float16 overflows above 65,504: use --dtype float32 or "
            "bfloat16. Otherwise the adapter's own weights are broken."
        )
    return logits.float()
