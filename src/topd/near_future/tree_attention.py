"""Attention of windows that branch off a rollout, for every model that takes attention functions from transformers.

A window token attends to the rollout before the window's start and to its own window before it: a tree. Two layouts:
`PackedRow`, one row [rollout | window 1 | window 2 | ...] with gradients, for training on windows; and `OpenBranches`,
windows that grow by one token a step over the rollout's kept keys and values: one copy of the prefix serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def supports_branches(model: Any) -> bool:
    """Whether windows can share their rollout's prefix: plain softmax attention over everything before, in all layers.

    Not so with sliding windows, linear attention, attention sinks or capped attention scores.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        full = getattr(config, "sliding_window", None) is None
    else:
        full = all(kind == "full_attention" for kind in layer_types)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    sinks = config.model_type == "gpt_oss"
    return full and not capped and not sinks and bool(getattr(model, "_supports_attention_backend", False))


class Tree(Protocol):
    """Attention under a layout. Takes [batch, head, token, width], returns [batch, token, head, width]."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor: ...


def sdpa_or_tree(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, tree: Tree | None = None, scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' "sdpa", unless the model's forward is given a `tree`.

    It stands in the place of "sdpa", and is not switched on for a while, because gradient checkpointing looks the
    function up once more in the backward pass.
    """
    if tree is not None:
        return tree.attend(module, query, key, value, scaling, dropout), None
    if attention_mask is not None and query.device.type != "cpu":
        attention_mask = attending(attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register("sdpa", sdpa_or_tree)


def attending(mask: Tensor) -> Tensor:
    """A bool mask under which every query attends to something; those that attended to nothing, to everything.

    Left padding attends to nothing. CUDA kernels have given NaN there, and since the next layer multiplies masked
    values by 0, NaN in padding is NaN in the whole row. What padding computes is not read. Additive masks stay.
    """
    return mask | ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask


@contextmanager
def using_sdpa(config: PreTrainedConfig) -> Iterator[None]:
    """For a forward pass without gradients of a model that usually attends otherwise."""
    usual = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = usual


def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions, which transformers hands on as it is: the tree knows who attends to whom."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class PackedRow:
    """One row [rollout | windows]: the rollout's tokens attend as if no window were there.

    Attributes:
        length: of the rollout's part.
        row_mask: bool [rollout, 1, query, key] among the rollout's own tokens; None: plainly causal.
        window_mask: bool [rollout, 1, window token, key], keys being the whole row.
    """

    length: int
    row_mask: Tensor | None
    window_mask: Tensor

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        row = self.length
        among_row, _ = sdpa_attention_forward(
            module, query[:, :, :row], key[:, :, :row], value[:, :, :row], self.row_mask, dropout, scaling
        )
        if query.shape[2] == row:  # windows of one token: nothing is fed
            return among_row
        of_windows, _ = sdpa_attention_forward(
            module, query[:, :, row:], key, value, self.window_mask, dropout, scaling, is_causal=False
        )
        return torch.cat([among_row, of_windows], dim=1)


@dataclass
class OpenBranches:
    """Windows that are being decoded, the same number of slots in each rollout.

    Attributes:
        prefix: for each layer, keys and values [rollout, head, row_position, width] of the rollouts.
        seen: bool [rollout, branch, row_position], True at what a branch sees; every branch sees something.
        room: tokens that each branch may grow by.
        size: tokens that each branch has grown by, the one being fed included.
        own: for each layer, keys and values [rollout, head, branch, token, width].
    """

    prefix: list[tuple[Tensor, Tensor]]
    seen: Tensor
    room: int
    size: int = 0
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _bias: Tensor | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """One token of each branch attends to the shared prefix and to its own branch: one softmax over both.

        Each part is normalised for itself, and the two are weighted by their log-sum-exps.
        """
        query, key = query.to(value.dtype), key.to(value.dtype)  # as SDPA has them under autocast
        batch, heads, branches, width = query.shape
        groups, layer = key.shape[1], int(module.layer_idx)  # type: ignore[arg-type]
        own_keys, own_values = self._append(layer, key, value)
        query = (query * (scaling if scaling is not None else width**-0.5)).reshape(batch, groups, -1, width)

        keys, values = self.prefix[layer]  # autocast leaves them in two dtypes, and prefill may have had another
        self.prefix[layer] = keys.to(query.dtype), values.to(query.dtype)
        from_prefix, prefix_lse = attention_and_lse(
            query, *self.prefix[layer], self._prefix_bias(heads // groups, query)
        )
        by_branch = query.view(batch, groups, -1, branches, width).transpose(2, 3)  # [..., branch, query head, width]
        scores = (by_branch @ own_keys.mT).to(prefix_lse.dtype)
        own_lse = scores.logsumexp(-1)
        from_own = (scores - own_lse[..., None]).exp().to(value.dtype) @ own_values

        prefix_lse = prefix_lse.view(batch, groups, -1, branches).transpose(2, 3)
        share = torch.sigmoid(prefix_lse - own_lse)[..., None].to(value.dtype)  # of the prefix in the whole softmax
        from_prefix = from_prefix.view(batch, groups, -1, branches, value.shape[-1]).transpose(2, 3)
        output = torch.lerp(from_own, from_prefix, share)  # [rollout, group, branch, query head, width]
        return output.transpose(1, 2).reshape(batch, branches, heads, -1)

    def _prefix_bias(self, queries: int, like: Tensor) -> Tensor:
        """[rollout, 1, query head of a group x branch, row_position]: 0 where seen, else -inf; one for all layers."""
        if self._bias is None:
            bias = torch.zeros(self.seen.shape, dtype=like.dtype, device=like.device)
            self._bias = bias.masked_fill_(~self.seen, -torch.inf).repeat(1, queries, 1)[:, None]
        return self._bias

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [rollout, head, branch, width] of the token being fed; those of each branch so far."""
        if layer not in self.own:
            self.own[layer] = (
                key.new_empty(*key.shape[:3], self.room, key.shape[3]),
                value.new_empty(*value.shape[:3], self.room, value.shape[3]),
            )
        keys, values = self.own[layer]
        keys[:, :, :, self.size - 1], values[:, :, :, self.size - 1] = key, value
        return keys[:, :, :, : self.size], values[:, :, :, : self.size]


def attention_and_lse(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [rollout, head, query, width] and the log-sum-exp of its scores [rollout, head, query]."""
    if (
        query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    ):  # fused: 1.5 to 2 x faster, scores never exist
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=1.0
        )
        return output, lse
    scores = (query @ key.mT + bias).to(torch.promote_types(query.dtype, torch.float32))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse
