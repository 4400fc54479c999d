"""Metrics of the near future, key by key. `docs/metrics.md` says the same to users; a test holds the two together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from topd.near_future import Rollouts
from topd.training.futures import NearFuture
from topd.training.guidance import Guided, own_share
from topd.training.method import Method

NEAR_FUTURE_METRICS = {
    "token_loss/mean": "mean token loss over response tokens (nats, scoring pass)",
    "token_loss/q50": "median token loss (nats)",
    "token_loss/q90": "90 % quantile of the token loss (nats)",
    "token_loss/q99": "99 % quantile of the token loss (nats)",
    "candidates/per_rollout": "candidates per rollout",
    "distance/q25": "lower quartile of D_OT over candidates (units of the ground cost)",
    "distance/q50": "median of D_OT over candidates",
    "distance/q75": "upper quartile of D_OT over candidates",
    "false_alarm_share": "share of candidates, with a distance, that are not forks (0..1); missing where none has one",
    "forks/per_rollout": "forks per rollout",
    "forks/threshold": "D_OT above which a candidate is a fork",
    "forks/low_loss_q50": "with fork_rule=low_loss_quartile, when it is estimated: median D_OT at low-loss positions",
    "windows/tokens": "tokens in the windows that were generated, both models, all processes",
    "guidance/positions": "window positions with a target, all processes",
    "guidance/own_token_share": "mean part of a target that is the student's own token at that position (0..1); in the "
    "student's contexts only",
    "guidance/loss": "L_traj of the step, without lambda (nats)",
    "guidance/grad_ratio": "|lambda grad L_traj| / |grad L_OPD| over the last trainable parameters, every 10 steps",
    "budget/predicted_overhead": "with max_overhead: predicted time over a step of plain OPD, as a share of it",
}
REMOTE_METRICS = {
    "token_loss/outside_top_k": "without a teacher_model: mean student probability outside the teacher's top-k (0..1)",
}


def near_future_metrics(
    future: NearFuture, guided: Guided | None, rollouts: Rollouts, method: Method, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """All but guidance/loss and guidance/grad_ratio, over the batches of all processes. `gather` may pad with NaN."""
    loss = _known(gather(future.look.token_loss[rollouts.loss_mask.bool()]))
    distance = _known(gather(future.candidates.distance))
    found = future.candidates
    from_student = 0 if method.student_window == "rollout" else int(found.ours.mask.sum())
    generated_tokens = int(found.theirs.mask.sum()) + from_student
    n_rollouts, n_candidates, n_forks, generated = gather(
        torch.tensor(
            [[len(rollouts), len(future.candidates), int(future.fork.sum()), generated_tokens]],
            device=loss.device,
            dtype=torch.float64,
        )
    ).sum(0)
    metrics = {
        "token_loss/mean": loss.mean(),
        **{f"token_loss/q{q}": _quantile(loss, q / 100) for q in (50, 90, 99)},
        "candidates/per_rollout": n_candidates / n_rollouts,
        **{f"distance/q{q}": _quantile(distance, q / 100) for q in (25, 50, 75)},
        "forks/per_rollout": n_forks / n_rollouts,
        "forks/threshold": torch.tensor(future.threshold),
        "windows/tokens": generated,
    }
    if len(distance):
        metrics["false_alarm_share"] = 1 - n_forks / len(distance)
    if future.look.low_loss is not None:
        metrics["forks/low_loss_q50"] = _quantile(_known(gather(future.look.low_loss.distance)), 0.5)
    if guided is not None:
        share = _known(gather(own_share(guided)))
        metrics["guidance/positions"] = torch.tensor(float(len(share)))
        if guided.context == "student":
            metrics["guidance/own_token_share"] = share.mean()
    numbers = torch.stack([value.to(loss.device, torch.float64) for value in metrics.values()])
    return dict(zip(metrics, numbers.tolist(), strict=True))  # the host waits for the device once


def _known(values: Tensor) -> Tensor:
    return values[~values.isnan()]


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear interpolation; NaN of nothing. (torch.quantile is limited to 16 million values.)"""
    if len(values) == 0:
        return torch.tensor(torch.nan)
    ordered = values.float().sort().values
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
