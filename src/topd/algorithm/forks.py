"""Fork or false alarm: which candidates really part (sections 2.1, 3 and 5.1)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ForkRule = Literal["low_loss_quartile", "batch_quantile", "threshold"]
"""low_loss_quartile: above the upper quartile of D_OT at low-loss positions (section 2.1). batch_quantile: above a
quantile of the batch's candidates. threshold: above a given distance."""

PAPER_FALSE_ALARM_SHARE = 0.30
"""The bottom 30 % of high-loss tokens by D_OT (section 5.1)."""


def is_fork(distance: Float[Tensor, "candidate"], threshold: float) -> Bool[Tensor, "candidate"]:
    """True where the two futures part, False at false alarms and where there is no distance (NaN).

    Args:
        distance: D_OT of each candidate, in units of the ground cost.
        threshold: distances above it are forks. Identical futures (distance 0) are never forks.
    """
    return distance > max(threshold, 0.0)


def low_loss_threshold(distance: Float[Tensor, "position"]) -> float:
    """Upper quartile of D_OT at low-loss positions: "the typical low-divergence range" of section 2.1.

    Args:
        distance: D_OT at low-loss positions, in units of the ground cost; NaN where there is none.

    Returns:
        The threshold of `is_fork`; NaN if no position has a distance.
    """
    known = distance[distance.isfinite()]
    return float(known.float().quantile(0.75)) if len(known) else float("nan")


def false_alarm_threshold(distance: Float[Tensor, "candidate"], share: float = PAPER_FALSE_ALARM_SHARE) -> float:
    """The distance that a share of the batch's candidates do not exceed; 0 if no candidate has a distance.

    Candidates at the threshold itself are false alarms, so with many ties more than the share are false alarms. Use
    `select_for_capping` where a number of candidates must be met.

    Args:
        distance: D_OT of each candidate of the batch, in units of the ground cost; NaN where there is none.
        share: our choice (the paper gives 0.30 for its down-weighting study only).

    Raises:
        ValueError: if `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1), got {share}.")
    known = distance[distance.isfinite()].sort().values
    count = int(share * len(known) + 0.5)
    return float(known[count - 1]) if count > 0 else 0.0


def rank_order(distance: Float[Tensor, "candidate"]) -> Tensor:
    """Indices of the candidates that have a distance, by distance; equal distances in a fixed random order.

    The order depends on the distances alone, so every selection by rank breaks ties in the same way (our choice).
    """
    known = distance.isfinite().nonzero().squeeze(-1)
    shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).to(known.device)]
    return shuffled[distance[shuffled].argsort(stable=True)]
