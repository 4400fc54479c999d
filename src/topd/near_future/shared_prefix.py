"""Windows decoded over one prefix: what a model keeps from having read a rollout serves all of its branches.

A greedy window costs nothing as long as it follows the rollout: there the model's own choice at every position is known
from scoring. Only from its first disagreement with the rollout on is it decoded, and windows that leave the rollout
at the same place share one branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topd.near_future.model_parts import cache_of
from topd.near_future.padding import inputs_of
from topd.near_future.tree_attention import OpenBranches, no_mask, using_sdpa
from topd.near_future.windows import Rollouts, Windows

NextToken = Callable[[Tensor], Tensor]
"""Last hidden states [..., width] to the next tokens [...]."""


@dataclass(frozen=True)
class Reading:
    """What a model keeps from having read rollouts.

    Attributes:
        hidden: [rollout, position, width], the states that predict each response token.
        prefix: for each layer, keys and values [rollout, head, row_position, width]; None where they were not kept.
        first: [rollout] the row index that has position id 0 (the prompt's padding, if it was left out of counting).
    """

    hidden: Tensor
    prefix: list[tuple[Tensor, Tensor]] | None = None
    first: Tensor | None = None

    def __getitem__(self, rows: slice) -> Reading:
        prefix = None if self.prefix is None else [(keys[rows], values[rows]) for keys, values in self.prefix]
        return Reading(self.hidden[rows], prefix, None if self.first is None else self.first[rows])


def read(backbone: nn.Module, rollouts: Rollouts) -> Reading:
    """Read rollouts and keep states, keys and values."""
    inputs = inputs_of(backbone, rollouts.input_ids, rollouts.causal_mask) | {"use_cache": True}
    output = backbone(**inputs)
    hidden = output.last_hidden_state[:, rollouts.prompt_ids.shape[1] - 1 : -1]
    first = (rollouts.prompt_mask == 0).sum(1)
    return Reading(hidden, [(layer.keys, layer.values) for layer in cache_of(output).layers], first)


@dataclass(frozen=True)
class Start:
    """How windows begin.

    Attributes:
        tokens: [window, window_position] what is known of each.
        known: [window] how many tokens that is, at least one.
    """

    tokens: Tensor
    known: Tensor


def follow_rollout(rollouts: Rollouts, greedy: Tensor, rows: Tensor, positions: Tensor, length: int) -> Start:
    """The greedy windows as far as scoring knows them: up to and with the first token that is not the rollout's.

    Args:
        greedy: [rollout, position] the model's most likely token at each position of the response.
        rows, positions: [window] where the windows start.
    """
    last = greedy.shape[1]
    index = torch.arange(last, device=greedy.device)
    agrees = (greedy == rollouts.response_ids) & rollouts.response_mask.bool()
    leaves = torch.where(agrees, last, index).flip(1).cummin(1).values.flip(1)  # [rollout, position] at or after it
    leaves = torch.minimum(leaves[rows, positions.clamp(max=last - 1)], rollouts.response_mask.sum(1)[rows])
    path = (positions[:, None] + torch.arange(length, device=greedy.device)).clamp(max=last - 1)
    real = rollouts.response_mask.sum(1)[rows]
    known = torch.where(leaves < real, leaves - positions + 1, real - positions)
    return Start(greedy[rows[:, None], path], known.clamp(max=length))


def sampled_start(reading: Reading, next_token: NextToken, rows: Tensor, positions: Tensor, length: int) -> Start:
    """Windows of which only the first token is known: it is sampled from the state at its position."""
    first = next_token(reading.hidden[rows, positions])
    return Start(first[:, None].repeat(1, length), torch.ones_like(rows))


def candidate_start(rollouts: Rollouts, greedy: Tensor | None, rows: Tensor, positions: Tensor, length: int) -> Start:
    """Windows that begin with the candidate, the rollout's own token at each place.

    Args:
        greedy: [rollout, position] the model's most likely token at each position: the windows continue greedily. None:
            only the candidate is known.
        rows, positions: [window] where the windows start.
    """
    candidate = rollouts.response_ids[rows, positions]
    if greedy is None or length == 1:
        return Start(candidate[:, None].repeat(1, length), torch.ones_like(rows))
    after = follow_rollout(rollouts, greedy, rows, positions + 1, length - 1)
    return Start(torch.cat([candidate[:, None], after.tokens], 1), after.known + 1)


def continue_over_prefix(
    backbone: nn.Module, config: Any, reading: Reading, start: Start, next_token: NextToken,
    rollouts: Rollouts, rows: Tensor, positions: Tensor, eos: Tensor, share: bool,
) -> Windows:  # fmt: skip
    """Finish windows: all branches of all rollouts together, one token of each a forward pass.

    Args:
        start: what is known of them.
        rows, positions: [window] where they start.
        eos: [token] ids that end a window; the one that ended it is part of it.
        share: windows that go on from the same place with the same token are one (greedy decoding).
    """
    length = start.tokens.shape[1]
    window_position = torch.arange(length, device=rows.device)
    known_mask = window_position < start.known[:, None]
    ended = (torch.isin(start.tokens, eos) & known_mask).any(1)
    last_place = positions + start.known - 1  # response position of the last known token, which is fed first
    last_token = start.tokens.gather(1, start.known[:, None] - 1).squeeze(1)
    open_ = (~ended & (start.known < length)).nonzero().squeeze(-1)
    tokens = start.tokens.clone()
    if len(open_):
        where = torch.stack([rows[open_], last_place[open_], last_token[open_]], 1)
        if share:
            branch_of, where = _unique_rows(where)
        else:
            branch_of = torch.arange(len(open_), device=rows.device)
        wanted = torch.zeros(len(where), dtype=torch.long, device=rows.device)
        wanted = wanted.scatter_reduce(0, branch_of, length - start.known[open_], "amax")
        grown = _grow(backbone, config, reading, next_token, rollouts, where, wanted, eos)
        column = window_position - start.known[open_][:, None]
        more = grown[branch_of[:, None], column.clamp(0, grown.shape[1] - 1)]
        tokens[open_] = torch.where(column >= 0, more, tokens[open_])
    mask = until_eos(tokens, eos)
    return Windows(tokens * mask, mask)


def until_eos(tokens: Tensor, eos: Tensor) -> Tensor:
    """True up to and with the first EOS: what comes before was generated, whatever its id (pad may equal EOS)."""
    is_eos = torch.isin(tokens, eos)
    return is_eos.cumsum(-1) - is_eos.long() == 0


def _unique_rows(where: Tensor) -> tuple[Tensor, Tensor]:
    unique, index = where.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    return index, unique


def _grow(
    backbone: nn.Module, config: Any, reading: Reading, next_token: NextToken, rollouts: Rollouts,
    where: Tensor, wanted: Tensor, eos: Tensor,
) -> Tensor:  # fmt: skip
    """[branch, token] what each branch (rollout, response position of its first fed token, that token) goes on with."""
    assert reading.prefix is not None
    order = where[:, 0].argsort(stable=True)
    row, slots = where[order, 0], torch.bincount(where[:, 0], minlength=len(rollouts))
    slot = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    prompt, most, steps = rollouts.prompt_ids.shape[1], int(slots.max()), int(wanted.max())

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(len(rollouts), most)
        out[row, slot] = values[order]
        return out

    place, fed = prompt + spread(where[:, 1]), spread(where[:, 2])  # row index of the token that is fed
    left = spread(wanted)
    used = int(place.max())
    seen = (torch.arange(used, device=row.device) < place[:, :, None]) & rollouts.attention_mask[:, None, :used].bool()
    tree = OpenBranches([(k[:, :, :used], v[:, :, :used]) for k, v in reading.prefix], seen, steps)
    if reading.first is not None:
        place = place - reading.first[:, None]
    grown = fed.new_zeros(len(rollouts), most, steps)
    with using_sdpa(config):
        for step in range(steps):
            tree.size = step + 1
            hidden = backbone(
                input_ids=fed, attention_mask=no_mask(fed.device), position_ids=place + step, use_cache=False, tree=tree
            ).last_hidden_state
            if not tree.own:
                raise RuntimeError(
                    f"{type(backbone).__name__} does not hand keyword arguments on to its attention function, so its "
                    "windows cannot share a prefix. Please report the model."
                )
            fed = next_token(hidden)
            grown[:, :, step] = fed
            left = torch.where(torch.isin(fed, eos), 0, left - 1)
            if not bool((left > 0).any()):
                break
    out = grown.new_zeros(len(where), steps)
    out[order] = grown[row, slot]
    return out
