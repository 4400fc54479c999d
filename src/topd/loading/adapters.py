"""Merge an adapter into its base, and check that the result computes what the adapted model computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from topd.errors import TOPDError

LARGEST_CHANGE = 0.1
"""Mean change of the logits, in units of their standard deviation, above which a merge is refused. Our choice: rounding
in bfloat16 gives about 0.01, a wrong merge 1 and more."""


def merged_adapter(adapted: Any, check: bool = True) -> Any:
    """The base model with the adapter's weights added to its own. It has its own output head where it has to.

    Embeddings and output head of many models are one tensor. An adapter on one of them changes that one alone, so a
    merge into the shared tensor would change both: the head is copied first, and the merged model is untied.

    Args:
        adapted: a PEFT model.
        check: compare the logits before and after. It takes two forward passes over 16 tokens, and whole weights.

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
    """Copy the output head's weight if it is the embeddings' and an adapter sits on either; in place."""
    layers = base.get_output_embeddings(), base.get_input_embeddings()
    head, embeddings = map(_without_adapter, layers)
    adapted = head is not layers[0] or embeddings is not layers[1]
    if not adapted or getattr(head, "weight", None) is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _without_adapter(layer: Any) -> Any:
    """The layer of the base inside whatever PEFT has put around it."""
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    return layer


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """[position, vocabulary] on 16 token ids spread over the vocabulary, in evaluation mode."""
    device, rows = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    logits: Tensor = model(input_ids=torch.linspace(0, rows - 1, 16, device=device).long()[None]).logits[0].float()
    model.train(was_training)
    return logits
