"""Which positions the method looks at, caps and guides, by the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topd.algorithm import Transport, highest_loss, select_for_capping

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

LOW_LOSS = 16
"""Low-loss positions per rollout that the fork threshold is estimated from, at most (our choice)."""


def choose_candidates(ranking: Tensor, mask: Tensor, options: TOPDConfig, at_most: int | None = None) -> Tensor:
    """High-loss positions; the control "random" takes equally many positions of each rollout at random instead."""
    if options.guides and options.guidance_at == "random":
        ranking = torch.rand(ranking.shape, device=ranking.device)
    chosen = highest_loss(
        ranking,
        mask,
        share=options.candidate_share,
        count=options.candidate_count,
        threshold=options.candidate_threshold,
        spacing=options.candidate_spacing,
    )
    if at_most is not None:
        chosen &= highest_loss(ranking, mask, share=None, count=at_most, spacing=options.candidate_spacing)
    return chosen


def choose_low_loss(token_loss: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
    """The positions with the lowest token loss, as many in each rollout as it has candidates, at most `LOW_LOSS`."""
    chosen = torch.zeros_like(candidates)
    for row, count in enumerate(candidates.sum(1).clamp(max=LOW_LOSS).tolist()):
        if count:
            chosen[row] = highest_loss(-token_loss[row : row + 1], mask[row : row + 1], share=None, count=count)[0]
    return chosen


def choose_capped(
    distance: Tensor, fork: Tensor, options: TOPDConfig, gather: Callable[[Tensor], Tensor], process: int
) -> Tensor:
    """Whose token loss is capped: the bottom share by rank over all processes (section 5.1), or its controls."""
    if options.method == "topd":
        return ~fork & distance.isfinite() if options.cap_false_alarms else torch.zeros_like(fork)
    owner = gather(torch.full_like(distance, process))
    chosen = select_for_capping(gather(distance), options.cap_selection, options.false_alarm_share)
    return chosen[owner == process]


def choose_guided(fork: Tensor, transport: Transport, options: TOPDConfig) -> Tensor:
    """Where the trajectory loss applies: at forks; the control "false_alarms" takes the others."""
    if not options.guides:
        return torch.zeros_like(fork)
    if options.guidance_at == "false_alarms":
        return transport.converged & ~fork
    return fork
