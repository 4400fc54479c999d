"""Sequences of different lengths in one batch: padding, position ids, and which rows may share a batch."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def left_padded(sequences: Sequence[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """[sequence, longest] token ids padded on the left with `value`, and the mask that is 1 at tokens."""
    ones = [torch.ones_like(sequence) for sequence in sequences]
    ids = pad_sequence(list(sequences), batch_first=True, padding_value=value, padding_side="left")
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


def positions_in(mask: Tensor) -> Tensor:
    """[row, index] position ids that count tokens only: 0 in left padding, the last token's in right padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def takes_positions(backbone: nn.Module) -> bool:
    """Whether the backbone's forward takes `position_ids`."""
    return "position_ids" in inspect.signature(type(backbone).forward).parameters


def last_states(backbone: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[row, index, width] the last hidden states that rows of token ids [row, index] have without padding.

    `mask`: [row, index], 1 at tokens; None: no row is padded on the left.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if mask is not None and takes_positions(backbone):
        inputs["position_ids"] = positions_in(mask)
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, group by group, in the order in which the keys first come."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())
