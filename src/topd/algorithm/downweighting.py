"""Down-weighting of high-loss tokens: the study of section 5.1 (Table 2) and the method `opd-capped`."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.algorithm.forks import PAPER_FALSE_ALARM_SHARE, rank_order

Selection = Literal["low", "high", "random"]
"""Which candidates to cap. low: lowest D_OT (the paper). Controls: high, equally many with the highest D_OT; random."""


def select_for_capping(
    distance: Float[Tensor, "candidate"],
    selection: Selection = "low",
    share: float = PAPER_FALSE_ALARM_SHARE,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "candidate"]:
    """Choose the candidates to cap, by rank. Every selection has the same size: `share` of the distances, rounded.

    Args:
        distance: D_OT of each candidate of the batch. NaN (no distance) is never chosen.
        selection: low: the bottom `share` (section 5.1). Controls: high, the top `share` (the paper's other arm);
            random. All break ties in the same order, see `rank_order`.
        share: 0.30 in the paper.
        generator: for the random selection.

    Raises:
        ValueError: `share` is not in [0, 1).
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
    weights = torch.ones_like(token_loss)
    for row in (capped & mask).any(-1).nonzero().squeeze(-1).tolist():
        median = token_loss[row, mask[row]].quantile(0.5).clamp(min=0)
        above = capped[row] & mask[row] & (token_loss[row] > median)
        weights[row, above] = median / token_loss[row, above]
    return weights
