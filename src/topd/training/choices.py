"""Which positions the method looks at, caps and guides, by the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topd.algorithm import Transport, highest_loss, select_for_capping

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig


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


def choose_capped(distance: Tensor, threshold: float, options: TOPDConfig) -> Tensor:
    """Whose token loss is capped: see section 5.1."""
    if options.method == "opd-capped":
        return select_for_capping(distance, options.cap_selection, threshold=threshold)
    if options.cap_false_alarms:
        return select_for_capping(distance, "low", threshold=threshold)
    return torch.zeros_like(distance, dtype=torch.bool)


def choose_guided(fork: Tensor, transport: Transport, options: TOPDConfig) -> Tensor:
    """Where the trajectory loss applies: at forks; the control "false_alarms" takes the others."""
    if not options.guides:
        return torch.zeros_like(fork)
    if options.guidance_at == "false_alarms":
        return transport.converged & ~fork
    return fork
