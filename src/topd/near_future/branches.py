"""A rollout and windows that branch off it, through a model together.

One row holds [prompt | response | window 1 | window 2 | ...]. A window token attends to the rollout's tokens before
the window's start and to the tokens of its own window before it: a tree-shaped mask. Its position id is the one that
it would have had, so its hidden state is what a separate sequence [prefix | window] would give, at a fraction of the
cost.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from topd.near_future.tree_attention import PackedRow, no_mask, supports_branches
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

    def __getitem__(self, rows: slice | Tensor) -> Branches:
        return Branches(self.position[rows], self.tokens[rows], self.mask[rows])


def hidden_with_branches(
    model: Any, backbone: nn.Module, rollouts: Rollouts, branches: Branches
) -> tuple[Tensor, Tensor]:
    """Last hidden states at the contexts of the response tokens and of the window tokens.

    Returns:
        [rollout, position, width] and [rollout, branch, window_position, width]: the states from which each response
        token and each window token is predicted. States of masked positions mean nothing.
    """
    attention = model.config._attn_implementation
    if supports_branches(model) and attention in ("sdpa", "flex_attention"):
        return packed(backbone, rollouts, branches, flex=attention == "flex_attention")
    warnings.warn(
        f"{type(model).__name__} with attn_implementation={attention!r} cannot run windows behind their rollout in one "
        "row (that takes full attention in every layer, and 'sdpa' or 'flex_attention'); each window goes through it "
        "behind its own copy of the prefix, which is much slower.",
        stacklevel=2,
    )
    return separate(backbone, rollouts, branches)


def rollout_hidden(backbone: nn.Module, rollouts: Rollouts) -> Tensor:
    """[rollout, position, width]: the states from which each response token is predicted."""
    hidden: Tensor = backbone(
        input_ids=rollouts.input_ids, attention_mask=rollouts.causal_mask, use_cache=False
    ).last_hidden_state
    return hidden[:, rollouts.prompt_ids.shape[1] - 1 : -1]


def packed(backbone: nn.Module, rollouts: Rollouts, branches: Branches, flex: bool = False) -> tuple[Tensor, Tensor]:
    """All windows of a rollout behind it in one row; with `flex`, the model attends by FlexAttention."""
    batch, slots, length = branches.tokens.shape
    prompt, row = rollouts.prompt_ids.shape[1], rollouts.input_ids.shape[1]
    fed = branches.tokens[:, :, :-1].reshape(batch, -1)  # the last token of a window predicts nothing
    start = prompt + branches.position  # [rollout, branch] index in the row
    offset = torch.arange(length - 1, device=start.device)
    position_ids = torch.cat(
        [torch.arange(row, device=start.device).expand(batch, -1), (start[:, :, None] + offset).reshape(batch, -1)], 1
    )
    if flex:
        who: dict[str, Any] = {"attention_mask": block_mask(rollouts, start, length - 1)}
    else:
        who = {"attention_mask": no_mask(start.device), "tree": tree(rollouts, start, length - 1)}
    hidden = backbone(
        input_ids=torch.cat([rollouts.input_ids, fed], dim=1), position_ids=position_ids, use_cache=False, **who
    ).last_hidden_state
    width = hidden.shape[-1]
    before = hidden.gather(1, (start - 1)[:, :, None].expand(-1, -1, width))
    inside = hidden[:, row:].view(batch, slots, length - 1, width)
    return hidden[:, prompt - 1 : row - 1], torch.cat([before[:, :, None], inside], dim=2)


def tree(rollouts: Rollouts, start: Tensor, length: int) -> PackedRow:
    """Who may attend to whom in [rollout | windows].

    Args:
        start: [rollout, branch], index in the row at which each window starts.
        length: tokens of each window that are fed.
    """
    real, device = rollouts.attention_mask.bool(), start.device
    slots, index = start.shape[1], torch.arange(real.shape[1], device=start.device)
    row_mask = None
    if rollouts.causal_mask is not None:
        row_mask = (index[:, None] >= index) & real[:, None, :]
        row_mask = (row_mask | (index[:, None] == index))[:, None]  # padding sees itself: a row of nothing is NaN
    sees_row = ((index < start[:, :, None]) & real[:, None, :]).repeat_interleave(length, dim=1)
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees_windows = torch.block_diag(*[own] * slots) if slots * length else own.new_zeros(0, 0)
    sees_windows = sees_windows.expand(len(rollouts), -1, -1)
    return PackedRow(real.shape[1], row_mask, torch.cat([sees_row, sees_windows], dim=2)[:, None])


def block_mask(rollouts: Rollouts, start: Tensor, length: int) -> BlockMask:
    """The same as `tree` for FlexAttention, which skips the blocks that nobody sees and never holds the square."""
    real = rollouts.attention_mask.bool()
    batch, row = real.shape
    whole = row + start.shape[1] * length

    def sees(rollout: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_real = real[rollout, key.clamp(max=row - 1)]
        in_row = (query < row) & (key <= query) & (is_real | (key == query))
        window, place = (query - row).div(length, rounding_mode="floor"), (query - row) % length
        begins = start[rollout, window.clamp(min=0)]
        of_prefix = (query >= row) & (key < begins) & is_real
        own = (key - row).div(length, rounding_mode="floor") == window
        of_window = (query >= row) & (key >= row) & own & ((key - row) % length <= place)
        return in_row | of_prefix | of_window

    return create_block_mask(sees, batch, None, whole, whole, device=str(start.device))


def separate(backbone: nn.Module, rollouts: Rollouts, branches: Branches) -> tuple[Tensor, Tensor]:
    """The plain way, for models that take no tree: every window behind its own copy of the prefix."""
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
