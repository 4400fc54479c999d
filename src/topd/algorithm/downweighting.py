"""Down-weighting of high-loss tokens: the study of section 5.1 (Table 2), and `opd-capped`."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.algorithm.forks import PAPER_FALSE_ALARM_SHARE, rank_order

Selection = Literal["low", "high", "random"]
"""Which candidates are capped. low: the lowest D_OT (the paper). Controls: high, as many with the highest; random."""


def select_for_capping(
    distance: Float[Tensor, "candidate"],
    selection: Selection = "low",
    share: float = PAPER_FALSE_ALARM_SHARE,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "candidate"]:
    """Choose the candidates to cap, by rank: every selection has the same number, `share` of the distances, rounded.

    Args:
        distance: D_OT of each candidate of the batch; those without one (NaN) are never chosen.
        selection: low: the bottom `share` (section 5.1). Controls: high, the top `share` (the paper's other arm);
            random. Ties are broken in the same order by all, see `rank_order`.
        share: paper: 0.30.
        generator: of the random choice.

    Raises:
        ValueError: if `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"false_alarm_share must be in [0, 1), got {share}.")
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
    """Weights that bring each capped token's loss down to its rollout's median token loss; 1 elsewhere.

    A weight is median / loss and carries no gradient, so the token's gradient shrinks by the same factor (the paper
    says that the contribution is capped; that the gradient is scaled rather than cut to zero is our choice). A loss
    that is at most the median keeps weight 1. The median is the mean of the two middle values for an even number.

    Args:
        token_loss: in nats.
        mask: positions that count (response tokens); the median is theirs.
        capped: positions to cap, from `select_for_capping`.
    """
    token_loss = token_loss.detach().to(torch.promote_types(token_loss.dtype, torch.float32))
    weights = torch.ones_like(token_loss)
    for row in (capped & mask).any(-1).nonzero().squeeze(-1).tolist():
        median = token_loss[row, mask[row]].quantile(0.5).clamp(min=0)
        above = capped[row] & mask[row] & (token_loss[row] > median)
        weights[row, above] = median / token_loss[row, above]
    return weights
