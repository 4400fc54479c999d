"""Down-weighting of high-loss tokens: the study of section 5.1 (Table 2), and `opd-capped`."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.algorithm.forks import is_fork

Selection = Literal["low", "high", "random"]
"""Which candidates are capped. low: false alarms. high: equally many, at random among forks. random: among all."""


def select_for_capping(
    distance: Float[Tensor, "candidate"],
    selection: Selection = "low",
    *,
    false_alarm_share: float = 0.30,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "candidate"]:
    """Choose the candidates to cap; the controls choose as many as `low` does (fewer if there are fewer forks).

    Args:
        distance: D_OT of each candidate; those without one (NaN) are never chosen.
        selection: low: false alarms (section 5.1). Controls: high, as many forks (the paper's other arm); random.
        false_alarm_share: as in `is_fork`.
        threshold: as in `is_fork`.
        generator: of the controls' random choice.

    Raises:
        ValueError: if `false_alarm_share` is not in [0, 1).
    """
    known = distance.isfinite()
    fork = is_fork(distance, false_alarm_share=false_alarm_share, threshold=threshold)
    low = known & ~fork
    if selection == "low":
        return low
    pool = (fork if selection == "high" else known).nonzero().squeeze(-1)
    order = torch.randperm(len(pool), generator=generator).to(pool.device)
    chosen = torch.zeros_like(known)
    chosen[pool[order[: int(low.sum())]]] = True
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
