"""Forks and false alarms: at which candidates the two futures diverge (sections 2.1, 3 and 5.1)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ForkRule = Literal["low_loss_quartile", "batch_quantile", "threshold"]
"""A fork has a D_OT above: low_loss_quartile, the upper quartile of D_OT at low-loss positions (section 2.1);
batch_quantile, a quantile over the batch's candidates; threshold, a fixed distance."""

PAPER_FALSE_ALARM_SHARE = 0.30
"""The bottom 30 % of high-loss tokens by D_OT (section 5.1)."""


def is_fork(distance: Float[Tensor, "candidate"], threshold: float) -> Bool[Tensor, "candidate"]:
    """True at forks; False at false alarms and where there is no distance (NaN).

    Args:
        distance: D_OT of each candidate, in units of the ground cost.
        threshold: a larger distance is a fork. Identical futures (distance 0) are never forks.
    """
    return distance > max(threshold, 0.0)


def low_loss_threshold(distance: Float[Tensor, "position"]) -> float:
    """Upper quartile of D_OT at low-loss positions: "the typical low-divergence range" of section 2.1.

    Args:
        distance: D_OT at low-loss positions, in units of the ground cost; NaN: no distance.

    Returns:
        The threshold of `is_fork`; NaN if no position has a distance.
    """
    known = distance[distance.isfinite()]
    return float(known.float().quantile(0.75)) if len(known) else float("nan")


def false_alarm_threshold(distance: Float[Tensor, "candidate"], share: float = PAPER_FALSE_ALARM_SHARE) -> float:
    """The quantile `share` of the batch's distances; 0 if no candidate has a distance.

    Candidates at the threshold are false alarms, so ties can make more than `share` of them false alarms.
    `select_for_capping` selects an exact number.

    Args:
        distance: D_OT of each candidate of the batch, in units of the ground cost; NaN: no distance.
        share: of candidates that are false alarms. Our choice; the paper uses 0.30 in its down-weighting study only.

    Raises:
        ValueError: `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1), got {share}.")
    known = distance[distance.isfinite()].sort().values
    count = int(share * len(known) + 0.5)
    return float(known[count - 1]) if count > 0 else 0.0


def rank_order(distance: Float[Tensor, "candidate"]) -> Tensor:
    """Indices of the candidates that have a distance, sorted by distance; ties in a fixed random order.

    The order depends on the distances alone, so every selection by rank breaks ties in the same way (our choice).
    """
    known = distance.isfinite().nonzero().squeeze(-1)
    shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).to(known.device)]
    return shuffled[distance[shuffled].argsort(stable=True)]
