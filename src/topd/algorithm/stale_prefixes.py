"""How likely a stored prefix still is: a weight of token losses where a batch of rollouts has several updates."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def prefix_weights(
    now: Float[Tensor, "rollout position"],
    then: Float[Tensor, "rollout position"],
    mask: Bool[Tensor, "rollout position"],
    most: float,
) -> Float[Tensor, "rollout position"]:
    """min(exp(mean over i < t of log p_now(i) - log p_then(i)), most) at each position t; no gradient.

    With a full-vocabulary KL the loss at a stored prefix is exact for the current student; only the prefix itself is
    stale. This is the geometric mean of its tokens' likelihood ratios (REVO, 2609.37500). It is 1 at a rollout's first
    token, whose prefix is the prompt, and everywhere while the student has not changed.

    Args:
        now: log-probabilities (nats) of the sampled tokens under the current student.
        then: the same under the student that sampled them.
        mask: the response tokens, the only ones that count.
        most: upper bound of the weights; 4 in that paper.
    """
    drift = torch.where(mask, now - then, 0.0)
    before = mask.cumsum(-1) - mask.long()
    return ((drift.cumsum(-1) - drift) / before.clamp(min=1)).exp().clamp(max=most)
