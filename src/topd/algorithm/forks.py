"""Which high-loss positions are candidates, which of these are forks or false alarms, and which are capped.

Sections 2.1, 3 and 5.1 of the paper. `select_for_capping` and `cap_weights` are the study of section 5.1 (Table 2) and
the method `opd-capped`.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.algorithm.vocabulary import check_choice

ForkRule = Literal["low_loss_quartile", "batch_quantile", "threshold"]
"""A fork has a D_OT above: low_loss_quartile, the upper quartile of D_OT at low-loss positions (section 2.1);
batch_quantile, a quantile over the batch's candidates; threshold, a fixed distance."""
Selection = Literal["low", "high", "random"]
"""Which candidates to cap. low: lowest D_OT (the paper). Controls: high, equally many with the highest D_OT; random."""
PAPER_CANDIDATE_SHARE = 0.0225
"""218 of 9,688 positions per rollout (appendix B.2)."""
PAPER_FALSE_ALARM_SHARE = 0.30
"""The bottom 30 % of high-loss tokens by D_OT (section 5.1)."""


def highest_loss(
    token_loss: Float[Tensor, "rollout position"],
    mask: Bool[Tensor, "rollout position"],
    *,
    share: float | None = PAPER_CANDIDATE_SHARE,
    count: int | None = None,
) -> Bool[Tensor, "rollout position"]:
    """Mark the candidates of each rollout: at least one, unless the rollout is empty.

    Give either share or count. The paper reports only the resulting number; the rule is our choice.

    Args:
        token_loss: the value to rank positions by: the token loss (nats), or the teacher's NLL of the sampled token.
        mask: the response tokens.
        share: select this share of a rollout's positions, rounded to the nearest number.
        count: select this many positions per rollout; all of them if the rollout is shorter.

    Returns:
        True at candidates. Ties are broken from the left.

    Raises:
        ValueError: both or neither are given, or a value is out of range.
    """
    if (share is None) == (count is None):
        raise ValueError(f"Give either share or count (got share={share}, count={count}).")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}.")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    mask = mask.bool()
    by_loss = token_loss.argsort(dim=-1, descending=True, stable=True)
    order = by_loss.gather(
        -1, mask.gather(-1, by_loss).int().argsort(dim=-1, descending=True, stable=True)
    )  # padding last
    lengths = mask.sum(-1, keepdim=True)
    wanted = torch.full_like(lengths, count) if count else (lengths.double() * (share or 0.0) + 0.5).floor()
    within = torch.arange(mask.shape[-1], device=mask.device) < wanted.clamp(min=1)
    return mask & torch.zeros_like(mask).scatter(-1, order, within)


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


def select_for_capping(
    distance: Float[Tensor, "candidate"],
    selection: Selection = "low",
    share: float = PAPER_FALSE_ALARM_SHARE,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "candidate"]:
    """Choose the candidates to cap, by rank. Every selection has the same size: `share` of the distances, rounded.

    Args:
        distance: D_OT of each candidate of the batch. NaN (no distance) is never chosen.
        selection: low: the bottom `share` (section 5.1). Controls: high, the top `share` (the paper draws as many
            from a "high-OT region" that it does not define); random. Ties are broken in one order, see `rank_order`.
        share: 0.30 in the paper.
        generator: for the random selection.

    Raises:
        ValueError: `share` is not in [0, 1), or `selection` is unknown.
    """
    if not 0 <= share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1), got {share}.")
    check_choice("selection", selection, Selection)
    order = rank_order(distance)
    count = int(share * len(order) + 0.5)
    if selection == "random":
        order = order[torch.randperm(len(order), generator=generator).to(order.device)]
    chosen = torch.zeros_like(distance, dtype=torch.bool)
    chosen[order[len(order) - count :] if selection == "high" else order[:count]] = True
    return chosen


def cap_weights(
    token_loss: Float[Tensor, "rollout position"],
    mask: Bool[Tensor, "rollout position"],
    capped: Bool[Tensor, "rollout position"],
) -> Float[Tensor, "rollout position"]:
    """Weights that reduce each capped token's loss to its rollout's median token loss; 1 elsewhere.

    A weight is median / loss. It is constant, so the token's gradient shrinks by the same factor. The paper only says
    that the contribution is capped; to scale the gradient instead of removing it is our choice. Losses up to the median
    keep weight 1. For an even number of tokens the median is the mean of the two middle values.

    Args:
        token_loss: in nats.
        mask: the response tokens, which the median is taken over.
        capped: positions to cap, from `select_for_capping`.
    """
    token_loss = token_loss.detach().to(torch.promote_types(token_loss.dtype, torch.float32))
    weights, mask, capped = torch.ones_like(token_loss), mask.bool(), capped.bool()
    for row in (capped & mask).any(-1).nonzero().squeeze(-1).tolist():
        median = token_loss[row, mask[row]].quantile(0.5).clamp(min=0)
        above = capped[row] & mask[row] & (token_loss[row] > median)
        weights[row, above] = median / token_loss[row, above]
    return weights
