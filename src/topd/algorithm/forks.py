"""Fork or false alarm: which candidates really part (sections 2.1, 3 and 5.1)."""

from jaxtyping import Bool, Float
from torch import Tensor

PAPER_FALSE_ALARM_SHARE = 0.30
"""The bottom 30 % of high-loss tokens by D_OT (section 5.1)."""


def is_fork(
    distance: Float[Tensor, "candidate"],
    *,
    false_alarm_share: float = PAPER_FALSE_ALARM_SHARE,
    threshold: float | None = None,
) -> Bool[Tensor, "candidate"]:
    """True where the two futures part, False at false alarms and where there is no distance (NaN).

    Args:
        distance: D_OT of each candidate of the batch.
        false_alarm_share: without a threshold, the candidates up to this quantile of the batch's distances are false
            alarms (our choice; the paper gives the share for its down-weighting study only). Candidates at the quantile
            itself are false alarms, so identical futures (distance 0) are never forks, and ties do not depend on order.
        threshold: distances above this are forks; such as the upper quartile of low-loss positions from a probe.

    Raises:
        ValueError: if `false_alarm_share` is not in [0, 1).
    """
    if not 0 <= false_alarm_share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1), got {false_alarm_share}.")
    if threshold is None:
        threshold = false_alarm_threshold(distance, false_alarm_share)
    return distance > max(threshold, 0.0)


def false_alarm_threshold(distance: Float[Tensor, "candidate"], share: float) -> float:
    """The distance that a share of the candidates do not exceed; 0 if no candidate has a distance.

    Args:
        distance: D_OT of each candidate of the batch, in units of the ground cost; NaN where there is none.
        share: paper (section 5.1): 0.30.

    Raises:
        ValueError: if `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1), got {share}.")
    known = distance[distance.isfinite()].sort().values
    at_most = int(share * len(known) + 0.5)
    return float(known[at_most - 1]) if at_most > 0 else 0.0
