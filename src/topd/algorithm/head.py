"""An output head: hidden states to logits, at least in float32."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SLICE_ELEMENTS = 2**20
"""Number of weights to cast at once on devices that cannot multiply 16-bit matrices into a float32 result."""


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype of logits and losses for hidden states of this dtype."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Head:
    """An output head: hidden states to logits, `softcap * tanh(scale * (h W^T + b) / softcap) / temperature`.

    Attributes:
        weight: [vocabulary, width]; converted to the dtype of the hidden states.
        bias: [vocabulary] or None.
        scale: factor on the logits. Without a softcap, 1 / temperature has the same effect.
        softcap: bound of the logits (Gemma), or None.
        temperature: divisor of the final logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Logits, differentiable. For bf16 states the logits are float32 and never rounded to bf16: that rounding alone
        changes the gradient of a small KL by 3 to 25 %."""
        dtype = at_least_float32(hidden)
        logits = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(hidden.dtype).to(dtype))
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def write_logits(
        self, hidden: Float[Tensor, "positions width"], out: Float[Tensor, "positions vocabulary"]
    ) -> Float[Tensor, "positions vocabulary"]:
        """Write `logits` to `out`, at least float32; no autograd, no temporary tile, no float32 copy of the weights."""
        if hidden.dtype == self.weight.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        elif hidden.is_cuda and hidden.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            rows = max(1, SLICE_ELEMENTS // max(1, hidden.shape[1]))
            states, buffer = hidden.to(out.dtype), out.new_empty(min(rows, out.shape[1]), hidden.shape[1])
            for part, columns in zip(torch.split(self.weight, rows), torch.split(out, rows, dim=1), strict=True):
                torch.mm(states, buffer[: len(part)].copy_(part.to(hidden.dtype)).T, out=columns)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out if self.scale == self.temperature else out.mul_(self.scale / self.temperature)

    def backward(self, logits: Tensor | None, grad: Tensor) -> Tensor:
        """Convert the gradient of the logits to that of `h W^T + b`. Overwrites both arguments.

        `logits` are needed only with a softcap.
        """
        if self.softcap is not None and logits is not None:  # 1 - tanh^2
            grad.mul_(logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1))
        return grad if self.scale == self.temperature else grad.mul_(self.scale / self.temperature)
