"""Candidates: the high-loss positions of each rollout, at which both models continue the prefix (section 3)."""

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
    by_loss = token_loss.argsort(dim=-1, descending=True, stable=True)
    order = by_loss.gather(
        -1, mask.gather(-1, by_loss).int().argsort(dim=-1, descending=True, stable=True)
    )  # padding last
    lengths = mask.sum(-1, keepdim=True)
    wanted = torch.full_like(lengths, count) if count else (lengths.double() * (share or 0.0) + 0.5).floor()
    within = torch.arange(mask.shape[-1], device=mask.device) < wanted.clamp(min=1)
    return mask & torch.zeros_like(mask).scatter(-1, order, within)
