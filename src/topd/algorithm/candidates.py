"""Candidates: the high-loss positions of each rollout, where the near future is looked at (section 3)."""

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
    """Mark the candidates of each rollout: at least one in every rollout that has a position.

    Exactly one of three rules holds; the paper gives only the resulting number, so which one is our choice.

    Args:
        token_loss: what positions are ranked by: the token loss (nats), or the teacher's NLL of the sampled token.
        mask: positions that count (response tokens).
        share: the highest `share` of a rollout's positions (rounded to the nearest number).
        count: this many positions of each rollout; fewer where it is shorter.
        threshold: every position whose loss is at least this.
        spacing: candidates of a rollout are at least this far apart; the higher loss goes first. 1 allows neighbours.

    Returns:
        True at candidates. Equal losses are taken from the left.

    Raises:
        ValueError: if not exactly one rule is given, or a value is out of range.
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
    """The first `wanted` of `order`, none closer than `spacing` to one taken before.

    A threshold or share counts positions before spacing, so fewer than `wanted` may remain.
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
