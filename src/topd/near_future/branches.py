"""A rollout and windows that branch off it, through a model together.

One row holds [prompt | response | window 1 | window 2 | ...]. A window token attends to the rollout's tokens before
the window's start and to the tokens of its own window before it: a tree-shaped mask. Its position id is the one that
it would have had, so its hidden state is what a separate sequence [prefix | window] would give, at a fraction of the
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from topd.near_future.attention_interface import laid_out
from topd.near_future.model_parts import last_states, left_padded, positions_in
from topd.near_future.tree_attention import PackedRow
from topd.near_future.ways import EXACT, Ways, ways_of
from topd.near_future.windows import Branches, Rollouts


def hidden_with_branches(
    model: Any, backbone: nn.Module, rollouts: Rollouts, branches: Branches, ways: Ways | None = None
) -> tuple[Tensor, Tensor]:
    """Last hidden states at the contexts of the response tokens and of the window tokens.

    `ways`: what is exact for the model; None: asks `ways_of`.

    Returns:
        [rollout, position, width] and [rollout, branch, window_position, width]: the states from which each response
        token and each window token is predicted. States of masked positions mean nothing.
    """
    ways = ways or ways_of(model)
    longest = rollouts.input_ids.shape[1] + branches.tokens.shape[-1]
    if longest <= ways.packed_rows:
        return packed(backbone, rollouts, branches)
    return separate(backbone, rollouts, branches, ways)


def rollout_hidden(backbone: nn.Module, rollouts: Rollouts, ways: Ways = EXACT) -> Tensor:
    """[rollout, position, width]: the states from which each response token is predicted."""
    groups = ways.rows_together(rollouts)
    if len(groups) == 1:
        mask = rollouts.attention_mask if ways.switch is not None else rollouts.causal_mask
        return last_states(backbone, rollouts.input_ids, mask)[:, rollouts.prompt_ids.shape[1] - 1 : -1]
    whole = replace(ways, left_padding=True)
    rows = [torch.tensor(group, device=rollouts.input_ids.device) for group in groups]
    parts = [rollout_hidden(backbone, rollouts[group].trimmed(), whole) for group in rows]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def packed(backbone: nn.Module, rollouts: Rollouts, branches: Branches) -> tuple[Tensor, Tensor]:
    """All windows of a rollout behind it in one row."""
    batch, slots, length = branches.tokens.shape
    prompt, row = rollouts.prompt_ids.shape[1], rollouts.input_ids.shape[1]
    fed = branches.tokens[:, :, :-1].reshape(batch, -1)  # the last token of a window predicts nothing
    start = prompt + branches.position  # [rollout, branch] index in the row
    input_ids = torch.cat([rollouts.input_ids, fed], dim=1)
    layout = tree(rollouts, start, length - 1)
    with laid_out(layout):
        hidden = backbone(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids),
            position_ids=layout.position, use_cache=False,
        ).last_hidden_state  # fmt: skip
    width = hidden.shape[-1]
    before = hidden.gather(1, (start - 1)[:, :, None].expand(-1, -1, width))
    inside = hidden[:, row:].view(batch, slots, length - 1, width)
    return hidden[:, prompt - 1 : row - 1], torch.cat([before[:, :, None], inside], dim=2)


def tree(rollouts: Rollouts, start: Tensor, length: int) -> PackedRow:
    """Who may attend to whom in [rollout | windows]; `length` tokens of each window are fed.

    `start`: [rollout, branch], index in the row at which each window starts.
    """
    real, device = rollouts.attention_mask.bool(), start.device
    in_windows = (start - rollouts.padding[:, None])[:, :, None] + torch.arange(length, device=device)
    position = torch.cat([positions_in(rollouts.attention_mask), in_windows.flatten(1)], dim=1)
    slots, index = start.shape[1], torch.arange(real.shape[1], device=start.device)
    row_mask = None
    if rollouts.causal_mask is not None:
        row_mask = (index[:, None] >= index) & real[:, None, :]
        row_mask = (row_mask | (index[:, None] == index))[:, None]  # padding sees itself: a row of nothing is NaN
    sees_row = ((index < start[:, :, None]) & real[:, None, :]).repeat_interleave(length, dim=1)
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees_windows = torch.block_diag(*[own] * slots) if slots * length else own.new_zeros(0, 0)
    sees_windows = sees_windows.expand(len(rollouts), -1, -1)
    return PackedRow(
        position, row_mask, torch.cat([sees_row, sees_windows], dim=2)[:, None], _sees(rollouts, start, length)
    )


def _sees(rollouts: Rollouts, start: Tensor, length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same for FlexAttention, which skips the blocks that nobody sees and never holds the square."""
    real = rollouts.attention_mask.bool()
    row = real.shape[1]

    def sees(rollout: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_real = real[rollout, key.clamp(max=row - 1)]
        in_row = (query < row) & (key <= query) & (is_real | (key == query))
        window, place = (query - row).div(length, rounding_mode="floor"), (query - row) % length
        begins = start[rollout, window.clamp(min=0)]
        of_prefix = (query >= row) & (key < begins) & is_real
        own = (key - row).div(length, rounding_mode="floor") == window
        of_window = (query >= row) & (key >= row) & own & ((key - row) % length <= place)
        return in_row | of_prefix | of_window

    return sees


def separate(backbone: nn.Module, rollouts: Rollouts, branches: Branches, ways: Ways = EXACT) -> tuple[Tensor, Tensor]:
    """The plain way, for models that take no tree: every window behind its own copy of the prefix."""
    row_hidden = rollout_hidden(backbone, rollouts, ways)
    batch, slots, length = branches.tokens.shape
    rows = [(b, f) for b in range(batch) for f in range(slots)]
    sequences = [
        torch.cat([rollouts.prefix(b, int(branches.position[b, f])), branches.tokens[b, f, :-1]]) for b, f in rows
    ]
    return row_hidden, ends_of(backbone, sequences, length, ways).view(batch, slots, length, -1)


def ends_of(backbone: nn.Module, sequences: Sequence[Tensor], length: int, ways: Ways = EXACT) -> Tensor:
    """[sequence, length, width] last hidden states at the last `length` tokens of sequences (token ids, 1-D)."""
    lengths = [len(sequence) for sequence in sequences]
    groups = ways.together(lengths, [-n for n in lengths])
    parts = []
    for group in groups:
        ids, mask = left_padded([sequences[index] for index in group])
        padded = len({lengths[index] for index in group}) > 1
        parts.append(last_states(backbone, ids, mask if padded else None)[:, -length:])
    order = [index for group in groups for index in group]
    return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]
