"""How a layout of windows reaches a model: through the masks that the model asks transformers for.

In every forward pass a model asks a mask function for one mask per kind of layer, and passes the kind's rule: causal,
sliding, chunked. It hands the answer to the attention function, layer by layer, without reading it. Both functions can
be registered. Ours answers with an object that knows the layout of the tokens and the rule of the layer, so that no
list of model types is needed. A model that reads or replaces its masks raises an error or bypasses the object:
`self_check` finds out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask

IN_LAYOUT = "topd"
"""Name of the attention implementation that takes nothing but layouts."""
READ = "The model reads its attention masks itself."


@dataclass(frozen=True)
class Rule:
    """A layer's own rule of which earlier tokens a token attends to, by position in an unpadded sequence."""

    function: Callable[..., Any] = causal_mask_function

    @property
    def causal(self) -> bool:
        """Whether it is: everything before, and nothing else."""
        return self.function is causal_mask_function

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the token at position `query` attends to the one at `key`; both broadcast."""
        first = torch.zeros((), dtype=torch.long, device=query.device)  # of the batch, and of the heads
        return self.function(first, first, query, key)


@dataclass(frozen=True)
class Attention:
    """One call of a layer's attention."""

    module: nn.Module  # the layer
    query: Tensor  # [batch, query head, query, width]
    key: Tensor  # [batch, key head, key, width]
    value: Tensor  # [batch, key head, key, value width]
    scaling: float | None = None  # of the scores; None: width ** -0.5
    dropout: float = 0.0  # of the probabilities
    softcap: float | None = None  # scores are `softcap * tanh(score / softcap)`
    # [query head], one more score in each softmax that takes its share and contributes nothing
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


class LayoutMask:
    """What layers get in the place of a mask: a layout of tokens, under the rule of a layer."""

    def attend(self, call: Attention) -> Tensor:
        """[batch, query, head, value width]"""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError(READ)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(READ)


class Layout(Protocol):
    """Who attends to whom, for the tokens of one forward pass."""

    def mask(self, rule: Rule, attention: str, asked: dict[str, Any]) -> Any:
        """What the attention implementation called `attention` takes; `asked`: what the model said of the mask."""
        ...


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Forward passes in this block have this layout, whatever the masks that they are given."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@contextmanager
def attending_in(layout: Layout, config: PreTrainedConfig) -> Iterator[None]:
    """`laid_out`, without gradients, for models with any attention implementation: here they use ours."""
    config = config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = IN_LAYOUT
    try:
        with laid_out(layout):
            yield
    finally:
        config._attn_implementation = usual


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if not isinstance(attention_mask, LayoutMask) or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__} makes attention masks of its own.")
    return attention_mask.attend(Attention(module, query, key, value, scaling, dropout, softcap, s_aux)), None


def _sdpa_or_layout(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", unless the mask is a layout.

    It stands in the place of "sdpa", and is not switched on for a while, because gradient checkpointing looks the
    function up once more in the backward pass.
    """
    if isinstance(attention_mask, LayoutMask):
        return _attend(module, query, key, value, attention_mask, *args, **kwargs)
    if attention_mask is not None and query.device.type != "cpu" and query.shape[2] > 1:  # one token sees itself
        attention_mask = attending(attention_mask)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    return output


def attending(mask: Tensor) -> Tensor:
    """A bool mask under which every query attends to something; those that attended to nothing, to everything.

    Left padding attends to nothing. CUDA kernels have given NaN there, and since the next layer multiplies masked
    values by 0, NaN in padding is NaN in the whole row. What padding computes is not read. Additive masks stay.
    """
    return mask | ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask


def _mask_or_layout(attention: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function that answers with the layout of the forward pass, if there is one."""

    def mask(*args: Any, **asked: Any) -> Any:
        layout = _layout.get()
        if layout is None:
            return usual(*args, **asked)
        if asked.get("use_vmap"):
            raise NotImplementedError("The model adds a mask of its own to the causal one.")
        return layout.mask(Rule(asked["mask_function"]), attention, asked)

    return mask


AttentionInterface.register(IN_LAYOUT, _attend)
AttentionInterface.register("sdpa", _sdpa_or_layout)
AttentionMaskInterface.register(IN_LAYOUT, _mask_or_layout(IN_LAYOUT, sdpa_mask))
for _name in ("sdpa", "eager", "flex_attention"):
    AttentionMaskInterface.register(_name, _mask_or_layout(_name, ALL_MASK_ATTENTION_FUNCTIONS[_name]))
