"""A rollout and windows that branch off it, through a model together.

One row holds [prompt | response | window 1 | window 2 | ...]. A window token attends to the rollout's tokens before
the window's start and to the tokens of its own window before it: a tree-shaped mask. Its position id is the one that
it would have had, so its hidden state is what a separate sequence [prefix | window] would give, at a fraction of the
cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from topd.near_future.windows import Rollouts


@dataclass(frozen=True)
class Branches:
    """Windows of a batch of rollouts, the same number of slots in each.

    Attributes:
        position: [rollout, branch] response position at which each window starts.
        tokens: [rollout, branch, window_position].
        mask: [rollout, branch, window_position], False throughout in an empty slot.
    """

    position: Tensor
    tokens: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> Branches:
        return Branches(self.position[rows], self.tokens[rows], self.mask[rows])


def supports_branches(config: PreTrainedConfig) -> bool:
    """Whether a model takes a tree-shaped mask: SDPA or eager attention, full attention in every layer."""
    text = config.get_text_config()
    full = all(kind == "full_attention" for kind in getattr(text, "layer_types", None) or [])
    has_layer_types = getattr(text, "layer_types", None) is not None
    slides = not has_layer_types and getattr(text, "sliding_window", None) is not None
    return config._attn_implementation in ("sdpa", "eager") and full and not slides


def hidden_with_branches(
    backbone: nn.Module, config: PreTrainedConfig, rollouts: Rollouts, branches: Branches
) -> tuple[Tensor, Tensor]:
    """Last hidden states at the contexts of the response tokens and of the window tokens.

    Returns:
        [rollout, position, width] and [rollout, branch, window_position, width]: the states from which each response
        token and each window token is predicted. States of masked positions mean nothing.
    """
    if supports_branches(config):
        return _packed(backbone, config, rollouts, branches)
    return _separate(backbone, rollouts, branches)


def rollout_hidden(backbone: nn.Module, rollouts: Rollouts) -> Tensor:
    """[rollout, position, width]: the states from which each response token is predicted."""
    hidden: Tensor = backbone(
        input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden[:, rollouts.prompt_ids.shape[1] - 1 : -1]


def _packed(
    backbone: nn.Module, config: PreTrainedConfig, rollouts: Rollouts, branches: Branches
) -> tuple[Tensor, Tensor]:
    batch, slots, length = branches.tokens.shape
    prompt, row = rollouts.prompt_ids.shape[1], rollouts.input_ids.shape[1]
    fed = branches.tokens[:, :, :-1].reshape(batch, -1)  # the last token of a window predicts nothing
    start = prompt + branches.position  # [rollout, branch] index in the row
    offset = torch.arange(length - 1, device=start.device)
    position_ids = torch.cat(
        [torch.arange(row, device=start.device).expand(batch, -1), (start[:, :, None] + offset).reshape(batch, -1)], 1
    )
    allowed = tree_mask(rollouts.attention_mask, start, length - 1)
    if config._attn_implementation == "eager":
        dtype = next(backbone.parameters()).dtype
        allowed = torch.zeros(allowed.shape, dtype=dtype, device=start.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
    hidden = backbone(
        input_ids=torch.cat([rollouts.input_ids, fed], dim=1),
        attention_mask=allowed,
        position_ids=position_ids,
        use_cache=False,
    ).last_hidden_state
    width = hidden.shape[-1]
    before = hidden.gather(1, (start - 1)[:, :, None].expand(-1, -1, width))
    inside = hidden[:, row:].view(batch, slots, length - 1, width)
    return hidden[:, prompt - 1 : row - 1], torch.cat([before[:, :, None], inside], dim=2)


def tree_mask(row_mask: Tensor, start: Tensor, length: int) -> Tensor:
    """Who may attend to whom in [row | windows]: bool [rollout, 1, query, key].

    Args:
        row_mask: [rollout, row_position], 0 at padding.
        start: [rollout, branch], index in the row at which each window starts.
        length: tokens of each window that are fed.
    """
    batch, row = row_mask.shape
    slots, device = start.shape[1], row_mask.device
    index = torch.arange(row, device=device)
    causal = (index[:, None] >= index) & row_mask.bool()[:, None, :]
    sees_row = (index < start[:, :, None]) & row_mask.bool()[:, None, :]
    sees_row = sees_row.repeat_interleave(length, dim=1)
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees_windows = torch.block_diag(*[own] * slots) if slots * length else own.new_zeros(0, 0)
    allowed = torch.zeros(batch, row + slots * length, row + slots * length, dtype=torch.bool, device=device)
    allowed[:, :row, :row] = causal
    allowed[:, row:, :row] = sees_row
    allowed[:, row:, row:] = sees_windows
    diagonal = torch.eye(row + slots * length, dtype=torch.bool, device=device)
    return (allowed | diagonal)[:, None]  # padding attends to itself: a row of nothing would be NaN


def _separate(backbone: nn.Module, rollouts: Rollouts, branches: Branches) -> tuple[Tensor, Tensor]:
    """The plain way, for models that take no tree mask: every window behind its own copy of the prefix."""
    row_hidden = rollout_hidden(backbone, rollouts)
    batch, slots, length = branches.tokens.shape
    rows = [(b, f) for b in range(batch) for f in range(slots)]
    sequences = [
        torch.cat([rollouts.prefix(b, int(branches.position[b, f])), branches.tokens[b, f, :-1]]) for b, f in rows
    ]
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.stack([torch.nn.functional.pad(s, (longest - len(s), 0)) for s in sequences])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(s), (longest - len(s), 0)) for s in sequences])
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return row_hidden, hidden[:, -length:].view(batch, slots, length, -1)
