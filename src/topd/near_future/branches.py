"""A rollout and windows that branch off it, through a model together.

One row holds [prompt | response | window 1 | window 2 | ...]. A window token attends to the rollout's tokens before
the window's start and to the tokens of its own window before it: a tree-shaped mask. Its position id is the one that
it would have had, so its hidden state is what a separate sequence [prefix | window] would give, at a fraction of the
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from topd.near_future.attention_interface import attending_in, laid_out
from topd.near_future.model_parts import last_states, left_padded
from topd.near_future.tree_attention import PackedRow, Recording
from topd.near_future.ways import EXACT, Ways, ways_of
from topd.near_future.windows import Rollouts

KeysValues = list[tuple[Tensor, Tensor]]
"""Of each attention call, keys and values [rollout, head, row_position, width]."""


# ------------------------------------------------------------------------------------------------------- rollouts alone


def rollout_hidden(backbone: nn.Module, rollouts: Rollouts, ways: Ways = EXACT) -> Tensor:
    """[rollout, position, width]: the states from which each response token is predicted."""
    groups = ways.rows_together(rollouts)
    if len(groups) == 1:
        ids, predicting = rollouts.left_aligned()
        return _at(predicting, last_states(backbone, ids, None))
    rows = [torch.tensor(group, device=rollouts.input_ids.device) for group in groups]
    parts = [rollout_hidden(backbone, rollouts[group], replace(ways, left_padding=True)) for group in rows]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def _at(index: Tensor, states: Tensor) -> Tensor:
    """[rollout, position, width] the states [rollout, row_position, width] at the index [rollout, position]."""
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1]))


@dataclass(frozen=True)
class Prefill:
    """What a model, or a teacher behind a server, computed when it read rollouts.

    Attributes:
        states: by name, [rollout, position, ...] what its token loss is computed from: `hidden`, the hidden states that
            predict each response token; of a server's teacher, `tokens` and `log_probs` (`KnownTokens`).
        prefix: keys and values, over which windows are decoded; None: windows start from fresh prefixes.
        begin: [rollout] where in the rows of `prefix` each rollout begins; what is before that is padding.
        greedy: [rollout, position] its most likely token at each position; known after scoring.
        parts: with several teachers, what each computed for its own rollouts.
    """

    states: dict[str, Tensor]
    prefix: KeysValues | None = None
    begin: Tensor | None = None
    greedy: Tensor | None = None
    parts: tuple[Prefill, ...] = ()

    @property
    def hidden(self) -> Tensor:
        """[rollout, position, width] the hidden states that predict each response token."""
        return self.states["hidden"]

    def __getitem__(self, rows: slice | Tensor) -> Prefill:
        assert not self.parts, "what several teachers computed is by their own rows, so it is not sliced"
        states = {name: values[rows] for name, values in self.states.items()}
        prefix = None if self.prefix is None else [(keys[rows], values[rows]) for keys, values in self.prefix]
        begin, greedy = (None if values is None else values[rows] for values in (self.begin, self.greedy))
        return Prefill(states, prefix, begin, greedy)

    def is_like(self, other: Prefill) -> bool:
        """Whether both prefixes have keys and values of the same shapes."""
        if self.prefix is None or other.prefix is None or len(self.prefix) != len(other.prefix):
            return False
        return all(
            a.shape[:2] == b.shape[:2] and a.shape[3:] == b.shape[3:]
            for pairs in zip(self.prefix, other.prefix, strict=True)
            for a, b in zip(*pairs, strict=True)
        )


def prefill(backbone: Any, rollouts: Rollouts) -> Prefill:
    """Read rollouts in one forward pass; keep hidden states, keys and values."""
    recording, (ids, predicting) = Recording(), rollouts.left_aligned()
    with attending_in(recording, backbone.config):
        states = last_states(backbone, ids, None)
    return Prefill({"hidden": _at(predicting, states)}, recording.kept, begin=torch.zeros_like(predicting[:, 0]))


def joined(groups: list[Prefill], rows: list[Tensor]) -> Prefill:
    """What `prefill` gives for a batch, from what it gave for groups of it; `rows`: numbers of their rollouts.

    The groups' keys and values are taken from them layer by layer, so that all are in memory once.
    """
    if len(groups) == 1:
        return groups[0]
    kept = [group.prefix or [] for group in groups]
    prefix = []
    for _ in range(len(kept[0])):
        keys, values = zip(*(layers.pop(0) for layers in kept), strict=True)
        prefix.append((_in_rows(keys, rows), _in_rows(values, rows)))
    order = torch.cat(rows).argsort()
    return Prefill({"hidden": torch.cat([group.hidden for group in groups])[order]}, prefix, torch.zeros_like(order))


def _in_rows(groups: Sequence[Tensor], rows: list[Tensor]) -> Tensor:
    """[rollout, head, row_position, width] of a batch, from groups of it; 0 where a group's rows are shorter."""
    length, like = max(group.shape[2] for group in groups), groups[0]
    out = like.new_zeros(sum(map(len, rows)), like.shape[1], length, like.shape[3])
    for group, numbers in zip(groups, rows, strict=True):
        out[numbers, :, : group.shape[2]] = group
    return out


# ----------------------------------------------------------------------------------------------- rollouts and windows


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
    model: Any, backbone: nn.Module, rollouts: Rollouts, branches: Branches, ways: Ways | None = None
) -> tuple[Tensor, Tensor]:
    """Last hidden states at the contexts of the response tokens and of the window tokens.

    `ways`: what is exact for the model; None: asks `ways_of`.

    Returns:
        [rollout, position, width] and [rollout, branch, window_position, width]: the states from which each response
        token and each window token is predicted. States of masked positions mean nothing.
    """
    ways = ways or ways_of(model)
    if int(rollouts.lengths.max()) + branches.tokens.shape[-1] <= ways.packed_rows:
        return packed(backbone, rollouts, branches)
    return separate(backbone, rollouts, branches, ways)


def packed(backbone: nn.Module, rollouts: Rollouts, branches: Branches) -> tuple[Tensor, Tensor]:
    """All windows of a rollout behind it in one row."""
    batch, slots, length = branches.tokens.shape
    ids, predicting = rollouts.left_aligned()
    fed = branches.tokens[:, :, :-1].reshape(batch, -1)  # the last token of a window predicts nothing
    start = rollouts.prompt_mask.sum(1)[:, None] + branches.position  # [rollout, branch] position in the row
    input_ids, layout = torch.cat([ids, fed], dim=1), tree(ids.shape[1], start, length - 1)
    with laid_out(layout):
        hidden = backbone(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids),
            position_ids=layout.position, use_cache=False,
        ).last_hidden_state  # fmt: skip
    width = hidden.shape[-1]
    before = hidden.gather(1, (start - 1)[:, :, None].expand(-1, -1, width))
    inside = hidden[:, ids.shape[1] :].view(batch, slots, length - 1, width)
    return _at(predicting, hidden), torch.cat([before[:, :, None], inside], dim=2)


def tree(row: int, start: Tensor, length: int) -> PackedRow:
    """Who may attend to whom in [rollout | windows].

    Args:
        row: tokens of the rollout's part.
        start: [rollout, branch] position at which each window starts.
        length: tokens of each window that are fed.
    """
    (batch, slots), device = start.shape, start.device
    index = torch.arange(row, device=device)
    in_windows = start[:, :, None] + torch.arange(length, device=device)
    position = torch.cat([index.expand(batch, -1), in_windows.flatten(1)], dim=1)
    sees_row = (index < start[:, :, None]).repeat_interleave(length, dim=1)
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees_windows = torch.block_diag(*[own] * slots) if slots * length else own.new_zeros(0, 0)
    sees = torch.cat([sees_row, sees_windows.expand(batch, -1, -1)], dim=2)[:, None]
    return PackedRow(position, sees, _sees(row, start, length))


def _sees(row: int, start: Tensor, length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same for FlexAttention, which skips the blocks that nobody sees and never holds the square."""

    def sees(rollout: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_row = (query < row) & (key <= query)
        window, place = (query - row).div(length, rounding_mode="floor"), (query - row) % length
        begins = start[rollout, window.clamp(min=0)]
        of_prefix = (query >= row) & (key < begins)
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
