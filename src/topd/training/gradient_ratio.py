"""How strong guidance is next to OPD: |lambda grad L_traj| / |grad L_OPD|, estimated on the last parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EVERY = 10
"""Optimizer steps from one estimate to the next."""
PARAMETERS = 8
"""Trainable parameters, the last ones of the backbone, over which the norms are taken."""


def last_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """The parameters for `gradient_ratio`; none where they are sharded (FSDP2)."""
    trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad][-PARAMETERS:]
    return [] if any(isinstance(parameter, DTensor) for parameter in trainable) else trainable


def gradient_ratio(
    states: Tensor,
    parameters: list[nn.Parameter],
    guidance: Callable[[Tensor], Tensor],
    opd: Callable[[Tensor], Tensor],
) -> Tensor:
    """|grad guidance| / |grad opd| over the parameters; our choice. It needs two more passes over the vocabulary.

    Args:
        states: [row, width] last hidden states, with their graph, which is kept.
        parameters: that the norms are taken over. The backward pass stops at the first of them.
        guidance: lambda L_traj of such states.
        opd: L_OPD of them.
    """
    norms = []
    for loss in (guidance, opd):
        leaf = states.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        found = torch.autograd.grad(states, parameters, gradient, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([each.norm() for each in found if each is not None]).norm())
    return norms[0] / norms[1]
