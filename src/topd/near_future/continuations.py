"""How a model continues prefixes: with `generate`, or all windows over what it kept when it read the rollouts.

A greedy window costs nothing as long as it follows the rollout: there the model's own choice at every position is known
from scoring. Only from its first disagreement with the rollout on is it decoded, and windows that leave the rollout
at the same place share one branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from topd.algorithm.vocabulary import at_least_float32, converted
from topd.near_future.attention_interface import attending_in
from topd.near_future.fast_decoding import weights_packed
from topd.near_future.model_parts import (
    backbone_of,
    left_padded,
    output_head,
    own_settings_only,
    takes_positions,
)
from topd.near_future.recurrent_states import cache_argument, keep_rows, most_at_once, rows_at_once, states_at
from topd.near_future.tree_attention import OpenBranches
from topd.near_future.ways import ways_of
from topd.near_future.windows import Places, Prefill, Rollouts, Windows

NextToken = Callable[[Tensor], Tensor]
"""Last hidden states [..., width] to the next tokens [...]."""
LEAVE = 0.75
"""Branches that have ended are dropped when at most this share of the decoded branches is still open: each time, states
are copied and the matrix products change their shape (our choice)."""


# --------------------------------------------------------------------------------------------------- sources of windows


class ContinuesPrefixes(Protocol):
    """A source of windows: a model in this process, or one behind a server. `eos_token_ids` end a window."""

    eos_token_ids: list[int]

    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """Continue each prefix (token ids, 1-D) by at most `length` tokens, fewer only where EOS comes first."""
        ...


class LocalModel:
    """Continues prefixes: with `generate`, batched by length, or over what the model kept from reading the rollouts.

    Args:
        model: any causal language model of transformers.
        pad_token_id: id for padding.
        eos_token_ids: ids that end a window; the one that was generated is part of it.
        temperature: 0 decodes greedily (our choice, for both models); else samples from the full distribution.
        batch_size: prefixes that are decoded together.
    """

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        eos_token_ids: Sequence[int],
        temperature: float = 0.0,
        batch_size: int = 128,
    ) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.eos_token_ids = list(eos_token_ids)
        self.batch_size = batch_size
        self.temperature = temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self._decoding = sampling if temperature > 0 else {"do_sample": False}

    @torch.no_grad()
    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """Continue each prefix (token ids, 1-D) by at most `length` tokens, fewer only where EOS comes first."""
        device = next(self.model.parameters()).device
        tokens = torch.full((len(prefixes), length), self.pad_token_id, device=device)
        with weights_packed(self.model):
            for chosen in self._batches([len(prefix) for prefix in prefixes], length):
                new = self._generate([prefixes[index] for index in chosen], length)
                tokens[chosen, : new.shape[1]] = new
        return Windows(tokens, until_eos(tokens, torch.tensor(self.eos_token_ids, device=device)))

    def _batches(self, lengths: list[int], growth: int) -> Iterator[list[int]]:
        """Numbers of the prefixes that are decoded together."""
        if not lengths:
            return
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        in_order = [lengths[index] for index in by_length]
        ways = ways_of(self.model)
        size = self.batch_size if ways.batches else 1
        for group in ways.together(in_order, [-n for n in in_order], growth):
            for start in range(0, len(group), size):
                yield [by_length[place] for place in group[start : start + size]]

    @torch.no_grad()
    def continue_over_prefix(
        self, places: Places, length: int, prefill: Prefill, from_candidate: bool = False
    ) -> Windows:
        """The greedy windows that `continue_` gives for the prefixes at the places, all branches decoded together.

        `prefill`: of the rollouts, with `prefix` and `greedy`. `from_candidate`: the windows begin with the rollout's
        own token.
        """
        if len(places) == 0:
            nothing = places.rows.new_zeros(0, length)
            return Windows(nothing, nothing.bool())
        assert prefill.greedy is not None
        head = output_head(self.model)

        def next_token(hidden: Tensor) -> Tensor:
            nonlocal head
            states = hidden.flatten(0, -2)
            head = converted(head, states)
            logits = states.new_empty(len(states), len(head.weight), dtype=at_least_float32(states))
            return head.write_logits(states, logits).argmax(-1).view(hidden.shape[:-1])

        start = (candidate_start if from_candidate else follow_rollout)(places, prefill.greedy, length)
        ends = torch.tensor(self.eos_token_ids, device=places.rows.device)
        with weights_packed(self.model):
            return continue_over_prefix(Decoder(backbone_of(self.model), next_token, ends), prefill, start, places)

    def _generate(self, prefixes: list[Tensor], length: int) -> Tensor:
        device = next(self.model.parameters()).device
        ids, mask = (part.to(device) for part in left_padded(prefixes, self.pad_token_id))
        config = GenerationConfig(
            max_new_tokens=length,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            bos_token_id=None,
            disable_compile=True,
            **self._decoding,
        )
        with own_settings_only(self.model):
            output: Tensor = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return output[:, ids.shape[1] :]


def until_eos(tokens: Tensor, eos: Tensor) -> Tensor:
    """True up to and with the first EOS: what comes before was generated, whatever its id (pad may equal EOS)."""
    is_eos = torch.isin(tokens, eos)
    return is_eos.cumsum(-1) - is_eos.long() == 0


# ------------------------------------------------------------------------------------------------------ over one prefix


@dataclass(frozen=True)
class Start:
    """How windows begin."""

    tokens: Tensor  # [window, window_position] what is known of each
    known: Tensor  # [window] how many tokens that is, at least one

    def __getitem__(self, which: Tensor) -> Start:
        return Start(self.tokens[which], self.known[which])


def follow_rollout(places: Places, greedy: Tensor, length: int) -> Start:
    """The greedy windows as far as scoring knows them: up to and with the first token that is not the rollout's.

    `greedy`: [rollout, position] the model's most likely token at each position of the response.
    """
    rollouts, rows, positions = places.rollouts, places.rows, places.positions
    last = greedy.shape[1]
    index = torch.arange(last, device=greedy.device)
    agrees = (greedy == rollouts.response_ids) & rollouts.response_mask.bool()
    leaves = torch.where(agrees, last, index).flip(1).cummin(1).values.flip(1)  # [rollout, position] at or after it
    leaves = torch.minimum(leaves[rows, positions.clamp(max=last - 1)], rollouts.response_mask.sum(1)[rows])
    path = (positions[:, None] + torch.arange(length, device=greedy.device)).clamp(max=last - 1)
    real = rollouts.response_mask.sum(1)[rows]
    known = torch.where(leaves < real, leaves - positions + 1, real - positions)
    return Start(greedy[rows[:, None], path], known.clamp(max=length))


def candidate_start(places: Places, greedy: Tensor, length: int) -> Start:
    """Windows that begin with the candidate, the rollout's own token at each place, and continue greedily."""
    candidate = places.tokens[:, None]
    if length == 1:
        return Start(candidate, torch.ones_like(places.rows))
    after = follow_rollout(places.moved(1), greedy, length - 1)
    return Start(torch.cat([candidate, after.tokens], 1), after.known + 1)


@dataclass(frozen=True)
class Decoder:
    """What decodes branches, one token of each per forward pass."""

    backbone: Any
    next_token: NextToken
    eos: Tensor  # [token] ids that end a window; the one that ended it is part of it


@dataclass(frozen=True)
class Feed:
    """What branches are decoded from, and how far."""

    row: Tensor  # [branch] its rollout
    position: Tensor  # [branch] response position of the token that is fed first, the last one that is known
    token: Tensor  # [branch] that token
    wanted: Tensor  # [branch] tokens to decode, unless EOS comes first

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: Tensor) -> Feed:
        return Feed(self.row[which], self.position[which], self.token[which], self.wanted[which])

    def of_rollouts(self, rows: slice) -> tuple[Feed, Tensor]:
        """The branches of these rollouts, as branches of that part, and a mask [branch] of which they are here."""
        which = (self.row >= rows.start) & (self.row < rows.stop)
        part = self.row[which] - rows.start, self.position[which], self.token[which], self.wanted[which]
        return Feed(*part), which


def continue_over_prefix(
    decoder: Decoder, prefill: Prefill, start: Start, places: Places, share: bool = True
) -> Windows:
    """Finish greedy windows: all branches of all rollouts together, one token of each per forward pass.

    Args:
        decoder: the model.
        prefill: of the rollouts, with `prefix`.
        start: what is known of the windows.
        places: where the windows start.
        share: windows that continue from the same place with the same token are decoded once.
    """
    tokens, length = start.tokens.clone(), start.tokens.shape[1]
    window_position = torch.arange(length, device=tokens.device)
    ended = (torch.isin(tokens, decoder.eos) & (window_position < start.known[:, None])).any(1)
    open_ = (~ended & (start.known < length)).nonzero().squeeze(-1)
    if len(open_):
        feed, branch = _feed(places[open_], start[open_], share)
        grown = _grow_in_parts(decoder, prefill, places.rollouts, feed)
        column = window_position - start.known[open_][:, None]
        more = grown[branch[:, None], column.clamp(0, grown.shape[1] - 1)]
        tokens[open_] = torch.where(column >= 0, more, tokens[open_])
    mask = until_eos(tokens, decoder.eos)
    return Windows(tokens * mask, mask)


def _feed(places: Places, start: Start, share: bool) -> tuple[Feed, Tensor]:
    """The branches of windows that are to be continued, and the number of each window's branch, [window]."""
    last_token = start.tokens.gather(1, start.known[:, None] - 1).squeeze(1)
    where = torch.stack([places.rows, places.positions + start.known - 1, last_token], 1)
    branch = torch.arange(len(where), device=where.device)
    if share:
        where, branch = where.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    missing = start.tokens.shape[1] - start.known
    wanted = where.new_zeros(len(where)).scatter_reduce(0, branch, missing, "amax")
    return Feed(where[:, 0], where[:, 1], where[:, 2], wanted), branch


def _grow_in_parts(decoder: Decoder, prefill: Prefill, rollouts: Rollouts, feed: Feed) -> Tensor:
    """[branch, token] how each branch continues, of as many rollouts and branches at a time as fit in memory."""
    grown = feed.wanted.new_zeros(len(feed), int(feed.wanted.max()))
    for rows in rows_at_once(decoder.backbone, torch.bincount(feed.row, minlength=len(rollouts)).tolist()):
        here, which = feed.of_rollouts(rows)
        branches = which.nonzero().squeeze(-1)
        for some in torch.arange(len(here), device=which.device).split(most_at_once(decoder.backbone)):
            if len(some):
                part = _grow(decoder, prefill[rows], rollouts[rows], here[some])
                grown[branches[some], : part.shape[1]] = part
    return grown


def _grow(decoder: Decoder, prefill: Prefill, rollouts: Rollouts, feed: Feed) -> Tensor:
    """[branch, token] how each branch continues: all are decoded together, and dropped once they have ended."""
    backbone, order = decoder.backbone, feed.row.argsort(stable=True)
    place = rollouts.prompt_mask.sum(1)[feed.row] + feed.position  # of the token that is fed first, in the row
    tree = _open_branches(prefill, feed.row[order], place[order], int(feed.wanted.max()))
    inputs: dict[str, Any] = {"use_cache": False}
    states = states_at(backbone, rollouts, tree.rollout, tree.start)
    if states is not None:
        inputs = {"use_cache": True, cache_argument(backbone): states}
    positions = takes_positions(backbone)
    branch, fed, left = order, feed.token[order], feed.wanted[order]
    grown = fed.new_zeros(len(feed), tree.room)
    with attending_in(tree, backbone.config):
        for step in range(tree.room):
            tree.grow()
            if positions:
                inputs["position_ids"] = (tree.start + step)[:, None]
            hidden = backbone(input_ids=fed[:, None], **inputs).last_hidden_state
            if tree.calls != len(tree.prefix):
                raise RuntimeError(f"{type(backbone).__name__} attends {tree.calls} times, not {len(tree.prefix)}.")
            fed = decoder.next_token(hidden.squeeze(1))
            grown[branch, step] = fed
            left = torch.where(torch.isin(fed, decoder.eos), 0, left - 1)
            still = (left > 0).nonzero().squeeze(-1)
            if not len(still):
                break
            if len(still) <= LEAVE * len(fed):
                branch, fed, left = branch[still], fed[still], left[still]
                tree.keep(still)
                if states is not None:
                    keep_rows(states, still)
    return grown


def _open_branches(prefill: Prefill, rollout: Tensor, start: Tensor, room: int) -> OpenBranches:
    """Branches [branch] of these rollouts, whose first token is fed at `start`, a position in prompt and response."""
    assert prefill.prefix is not None
    assert prefill.begin is not None
    used = int((prefill.begin[rollout] + start).max())
    row_position = torch.arange(used, device=start.device) - prefill.begin[:, None]
    prefix = [(keys[:, :, :used], values[:, :, :used]) for keys, values in prefill.prefix]
    return OpenBranches(prefix, row_position, rollout, start, room)
