"""Attention of windows that branch off a rollout.

A window token attends to the rollout before the window's start and to its own window before it: a tree. Three layouts:
`Recording`, the rollout alone, whose keys and values are kept; `OpenBranches`, windows that grow by one token a step
over what was kept: one copy of the prefix serves them all; and `PackedRow`, one row [rollout | window 1 | window 2 |
...] with gradients, for training on windows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from topd.near_future.attention_interface import Attention, LayoutMask, Rule, attending
from topd.near_future.windows import slots

QUERIES_AT_ONCE = 256
"""Queries whose scores are in memory together, where no fused kernel is used."""


# ---------------------------------------------------------------------------------------------------------- one rollout


@dataclass
class Recording:
    """A rollout as a model usually reads it. The keys and values of each attention call are kept, in order of calls.

    They are kept as they pass through attention, not as a cache holds them: caches of sliding windows drop tokens, and
    those of multi-head latent attention hold latents.
    """

    # of each call, keys and values [rollout, head, row_position, width]
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def mask(self, rule: Rule, attention: str, asked: dict[str, Any]) -> LayoutMask:
        return _Recorded(self, sdpa_mask(**asked))


@dataclass(frozen=True)
class _Recorded(LayoutMask):
    recording: Recording
    allowed: Tensor | None

    def attend(self, call: Attention) -> Tensor:
        self.recording.kept.append((call.key.contiguous(), call.value.contiguous()))
        if call.plain:
            return _sdpa(call, call.query, call.key, call.value, self.allowed)
        return _attend_in_blocks(call, self.allowed)


def _sdpa(call: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    if mask is not None and query.device.type != "cpu":
        mask = attending(mask)
    output: Tensor = sdpa_attention_forward(
        call.module, query, key, value, mask, dropout=call.dropout, scaling=call.scaling, softcap=call.softcap, **kwargs
    )[0]
    return output


def _attend_in_blocks(call: Attention, allowed: Tensor | None) -> Tensor:
    """Attention with capped scores or sinks, which SDPA does not have; `allowed`: bool mask, None: causal."""
    batch, heads, queries, _ = call.query.shape
    query, key, value = _grouped(call)
    position = torch.arange(queries, device=query.device)
    parts = []
    for start in range(0, queries, QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        seen = position[rows, None] >= position if allowed is None else allowed[:, :, rows]
        scores = capped(query[..., rows, :] @ key[:, :, None].mT, call.softcap)
        hidden = torch.finfo(torch.float32).min  # not -inf: padding sees nothing, and must not become NaN
        scores = scores.float().masked_fill(~seen if allowed is None else ~seen[:, :, None], hidden)
        lse = scores.logsumexp(-1)
        if call.sinks is not None:
            lse = torch.logaddexp(lse, call.sinks.view(query.shape[1], -1)[:, :, None].to(lse.dtype))
        parts.append((scores - lse[..., None]).exp().to(value.dtype) @ value[:, :, None])
    return torch.cat(parts, dim=-2).reshape(batch, heads, queries, -1).transpose(1, 2)


def _grouped(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries [batch, key head, query heads of it, query, width], keys and values, in one dtype."""
    value = call.value
    query, key = call.query.to(value.dtype), call.key.to(value.dtype)  # as SDPA has them under autocast
    scaling = call.scaling if call.scaling is not None else query.shape[-1] ** -0.5
    return (query * scaling).unflatten(1, (key.shape[1], -1)), key, value


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores under a soft cap; None: as they are."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


# --------------------------------------------------------------------------------------------------------- one long row


@dataclass(frozen=True)
class PackedRow:
    """One row [rollout | windows]: the rollout's tokens attend as if no window were there."""

    position: Tensor  # [rollout, token] in a separate sequence, of the whole row
    window_mask: Tensor  # bool [rollout, 1, window token, key], keys being the whole row
    # the same as a function of (rollout, head, query, key), for FlexAttention
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    @property
    def length(self) -> int:
        """Tokens of the rollout's part."""
        return self.position.shape[1] - self.window_mask.shape[2]

    def mask(self, rule: Rule, attention: str, asked: dict[str, Any]) -> Any:
        if attention == "flex_attention":
            return self._for_flex(rule)
        row, windows = None, self.window_mask  # None: the rollout's own tokens are plainly causal
        if not rule.causal:
            position, length = self.position, self.length
            row = rule(position[:, :length, None], position[:, None, :length])[:, None] & self._row_mask()
            windows = windows & rule(position[:, length:, None], position[:, None])[:, None]
        if attention == "eager":
            return self._dense(self._row_mask() if row is None else row, windows, asked["dtype"])
        return _Packed(self.length, row, windows)

    def _row_mask(self) -> Tensor:
        index = torch.arange(self.length, device=self.position.device)
        return (index[:, None] >= index).expand(len(self.position), 1, -1, -1)

    def _dense(self, row: Tensor, windows: Tensor, dtype: torch.dtype) -> Tensor:
        """[rollout, 1, query, key], 0 where seen, else the lowest number: what is added to scores."""
        allowed = torch.cat([pad(row, (0, windows.shape[2])), windows], dim=2)
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)

    def _for_flex(self, rule: Rule) -> Any:
        def sees(rollout: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at, of = self.position[rollout, query], self.position[rollout, key]
            return self.sees(rollout, head, query, key) & (rule.function(rollout, head, at, of) | (query == key))

        batch, whole = self.position.shape
        return create_block_mask(sees, batch, None, whole, whole, device=str(self.position.device))


@dataclass(frozen=True)
class _Packed(LayoutMask):
    length: int
    row_mask: Tensor | None
    window_mask: Tensor

    def attend(self, call: Attention) -> Tensor:
        row, query, key, value = self.length, call.query, call.key, call.value
        among_row = _sdpa(call, query[:, :, :row], key[:, :, :row], value[:, :, :row], self.row_mask)
        if query.shape[2] == row:  # windows of one token: nothing is fed
            return among_row
        of_windows = _sdpa(call, query[:, :, row:], key, value, self.window_mask, is_causal=False)
        return torch.cat([among_row, of_windows], dim=1)


# -------------------------------------------------------------------------------------------------------- open branches


@dataclass
class OpenBranches:
    """Windows that are being decoded; each branch is a row of one token.

    Only attention to the prefix is laid out as [rollout, slot]: the branches of a rollout fill its first slots, and
    all rollouts have as many slots as the one with most branches.
    """

    # of each attention call, keys and values [rollout, head, row_position, width] of the rollouts
    prefix: list[tuple[Tensor, Tensor]]
    row_position: Tensor  # [rollout, row_position] of the rollouts' tokens in an unpadded sequence; negative: padding
    rollout: Tensor  # [branch] ascending
    start: Tensor  # [branch] position of the first token that is fed
    room: int  # tokens that each branch may grow by
    size: int = 0  # tokens that each branch has grown by, the one being fed included
    # of each call, keys and values [branch, head, token, width]
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    calls: int = 0  # of attention in this forward pass
    _whole: LayoutMask | None = None

    def __post_init__(self) -> None:
        self._assign_slots()

    def _assign_slots(self) -> None:
        self.slot = slots(self.rollout)
        self.most = int(self.slot.max()) + 1

    def grow(self) -> None:
        """A forward pass for the next token of each branch begins."""
        self.size, self.calls = self.size + 1, 0

    def keep(self, which: Tensor) -> None:
        """Continue with these branches only; `which`: [kept] ascending."""
        self.rollout, self.start, self._whole = self.rollout[which], self.start[which], None
        self.own = [(keys[which], values[which]) for keys, values in self.own]
        self._assign_slots()

    def in_slots(self, values: Tensor) -> Tensor:
        """[branch, ...] as [rollout, slot, ...], 0 in empty slots."""
        out = values.new_zeros(len(self.row_position), self.most, *values.shape[1:])
        out[self.rollout, self.slot] = values
        return out

    def mask(self, rule: Rule, attention: str, asked: dict[str, Any]) -> LayoutMask:
        if rule.causal:
            self._whole = self._whole or _Branches(self, self._before(), None, None)
            return self._whole
        at = self.start + self.size - 1
        seen = self._before() & rule(self.in_slots(at)[:, :, None], self.row_position[:, None])
        blind = ~seen.any(-1)  # the rollout is out of a sliding window's reach
        own = rule(at[:, None], self.start[:, None] + torch.arange(self.size, device=at.device))
        return _Branches(self, seen | blind[:, :, None], own, blind[self.rollout, self.slot])

    def _before(self) -> Tensor:
        """bool [rollout, slot, row_position], True at the tokens before each branch."""
        position = self.row_position[:, None]
        return (position >= 0) & (position < self.in_slots(self.start)[:, :, None])

    def prefix_for(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the call that is due, as `attention_and_lse` computes fastest with these queries."""
        key, value = self.prefix[self.calls]
        narrow = query.shape[-1] - value.shape[-1]  # values of multi-head latent attention are
        if query.device.type == "cpu" and narrow > 0:
            value = pad(value, (0, narrow))
        key, value = key.to(query.dtype), value.to(query.dtype)  # kept under another autocast, or rotated in float32
        self.prefix[self.calls] = (key, value)
        return key, value

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [branch, head, width] of the token being fed; those of each branch so far."""
        call = self.calls
        if call == len(self.own):
            self.own.append(
                (
                    key.new_empty(*key.shape[:2], self.room, key.shape[2]),
                    value.new_empty(*value.shape[:2], self.room, value.shape[2]),
                )
            )
        self.calls += 1
        keys, values = self.own[call]
        keys[:, :, self.size - 1], values[:, :, self.size - 1] = key, value
        return keys[:, :, : self.size], values[:, :, : self.size]


@dataclass
class _Branches(LayoutMask):
    """`own`: bool [branch, token]; `blind`: bool [branch], where nothing of the prefix is seen."""

    tree: OpenBranches
    seen: Tensor  # bool [rollout, slot, row_position]
    own: Tensor | None
    blind: Tensor | None
    _bias: Tensor | None = None

    def attend(self, call: Attention) -> Tensor:
        """One token of each branch attends to the shared prefix and to its own branch: one softmax over both.

        Each part is normalised for itself, and the two are weighted by their log-sum-exps.
        """
        tree = self.tree
        query, key, value = (x.squeeze(-2) for x in _grouped(call))
        groups, queries = query.shape[1:3]  # query: [branch, group, query head, width]
        prefix = tree.prefix_for(query)
        own_keys, own_values = tree.append(key, value)

        of_group = tree.in_slots(query).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [rollout, group, head x slot, width]
        from_prefix, prefix_lse = attention_and_lse(of_group, *prefix, self._prefix_bias(queries, query), call.softcap)
        place = tree.rollout, slice(None), slice(None), tree.slot
        from_prefix = from_prefix[..., : value.shape[-1]].unflatten(2, (queries, tree.most))[place]
        prefix_lse = prefix_lse.unflatten(2, (queries, tree.most))[place]
        if self.blind is not None:
            prefix_lse = prefix_lse.masked_fill(self.blind[:, None, None], -torch.inf)

        scores = capped(query @ own_keys.mT, call.softcap).to(prefix_lse.dtype)  # [branch, group, query head, token]
        if self.own is not None:
            scores = scores.masked_fill(~self.own[:, None, None], -torch.inf)
        own_lse = scores.logsumexp(-1)
        from_own = (scores - own_lse[..., None]).exp().to(value.dtype) @ own_values

        share = torch.sigmoid(prefix_lse - own_lse)  # of the prefix in the whole softmax
        output = torch.lerp(from_own, from_prefix, share[..., None].to(value.dtype))
        if call.sinks is not None:
            whole_lse = torch.logaddexp(prefix_lse, own_lse)
            share = torch.sigmoid(whole_lse - call.sinks.view(groups, queries).to(whole_lse.dtype))
            output = output * share[..., None].to(value.dtype)
        return output.reshape(len(output), 1, groups * queries, -1)

    def _prefix_bias(self, queries: int, like: Tensor) -> Tensor:
        """[rollout, 1, query head of a group x slot, row_position]: 0 where seen, else -inf; one for all layers."""
        if self._bias is None or self._bias.dtype != like.dtype or self._bias.shape[2] != queries * self.tree.most:
            bias = torch.zeros(self.seen.shape, dtype=like.dtype, device=like.device)
            self._bias = bias.masked_fill_(~self.seen, -torch.inf).repeat(1, queries, 1)[:, None]
        return self._bias


def attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention [rollout, head, query, value width] and the log-sum-exp of its scores [rollout, head, query]."""
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=1.0
        )  # 1.5 to 2 x faster; scores never exist
        return output, lse
    scores = capped(query @ key.mT, softcap)
    scores = (scores + bias).to(torch.promote_types(query.dtype, torch.float32))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse
