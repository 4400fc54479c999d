"""Candidates: the high-loss positions of each rollout, at which both models continue the prefix (section 3)."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PAPER_SHARE = 0.0225
"""218 of 9,688 positions per rollout (appendix B.2)."""


def highest_loss(
    token_loss: Float[Tensor, "rollout position"],
    mask: Bool[Tensor, "rollout position"],
    *,
    share: float | None = PAPER_SHARE,
    count: int | None = None,
    threshold: float | None = None,
    spacing: int = 1,
) -> Bool[Tensor, "rollout position"]:
    """Mark the candidates of each rollout: at least one, unless the rollout is empty.

    Give exactly one of share, count and threshold. The paper reports only the resulting number; the rule is our choice.

    Args:
        token_loss: the value to rank positions by: the token loss (nats), or the teacher's NLL of the sampled token.
        mask: the response tokens.
        share: select this share of a rollout's positions, rounded to the nearest number.
        count: select this many positions per rollout; all of them if the rollout is shorter.
        threshold: select every position whose loss is at least this.
        spacing: minimum distance between candidates of a rollout; the higher loss takes precedence. 1: no minimum.

    Returns:
        True at candidates. Ties are broken from the left.

    Raises:
        ValueError: not exactly one rule is given, or a value is out of range.
    """
    _check(share, count, threshold, spacing)
    chosen = torch.zeros_like(mask)
    for row in range(mask.shape[0]):
        positions = mask[row].nonzero().squeeze(-1)
        if len(positions) == 0:
            continue
        losses = token_loss[row, positions]
        order = positions[losses.argsort(descending=True, stable=True)]
        if threshold is not None:
            wanted = int((losses >= threshold).sum())
        elif count is not None:
            wanted = count
        else:
            wanted = math.floor((share or 0.0) * len(positions) + 0.5)
        chosen[row, _spaced(order, max(1, wanted), spacing)] = True
    return chosen


def _spaced(order: Tensor, wanted: int, spacing: int) -> Tensor:
    """The first `wanted` positions of `order`, without those closer than `spacing` to an earlier one.

    `threshold` and `share` count positions before spacing, so the result may be shorter than `wanted`.
    """
    if spacing == 1:
        return order[:wanted]
    taken: list[int] = []
    for position in order.tolist():
        if len(taken) == wanted:
            break
        if all(abs(position - other) >= spacing for other in taken):
            taken.append(position)
    return torch.tensor(taken, device=order.device)


def _check(share: float | None, count: int | None, threshold: float | None, spacing: int) -> None:
    rules = [rule for rule in (share, count, threshold) if rule is not None]
    if len(rules) != 1:
        raise ValueError(
            f"Give exactly one of share, count and threshold (got share={share}, count={count}, threshold={threshold})."
        )
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}.")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    if spacing < 1:
        raise ValueError(f"spacing must be at least 1, got {spacing}.")
