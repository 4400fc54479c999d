"""How many of a pair's high-loss tokens are false alarms? (Section 2.1, Fig. 2.) Measuring; `probe_summary` concludes.

At the highest, the lowest and random token losses of each rollout, equally many of each, student and teacher continue
the student's prefix greedily, and D_OT says how far the two windows are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy
import torch
from torch import Tensor

from topd.algorithm import TokenScores, highest_loss, score_tokens
from topd.algorithm.transport import GroundCost
from topd.analysis.probe_summary import GROUPS, Probe
from topd.near_future import DistilledModel, Rollouts, Windows, near_future_transport
from topd.near_future.matching import Embedding

RECORD_VERSION = 1


@dataclass(frozen=True)
class ProbeOptions:
    """What is measured. The first of each is the main one; the others are measured on the same windows.

    Attributes:
        share: of a rollout's positions in each group, at least one.
        window_lengths: K. Windows have the longest; a shorter one is its beginning.
        embeddings, costs: as in `TOPDConfig`.
        seed: of the random positions.
    """

    share: float = 0.0225
    window_lengths: tuple[int, ...] = (50,)
    embeddings: tuple[Embedding, ...] = ("student",)
    costs: tuple[GroundCost, ...] = ("cosine",)
    seed: int = 0

    @property
    def variants(self) -> list[str]:
        """Names such as "student/cosine/50", the main one first."""
        return [f"{e}/{c}/{k}" for e, c, k in product(self.embeddings, self.costs, self.window_lengths)]


@dataclass(frozen=True)
class Measured:
    """One group's positions in a batch of rollouts.

    Attributes:
        rows, positions: [place] where they are.
        ours, theirs: both windows at each.
        distances: by variant, [place] D_OT; NaN where there is none.
        plan: [place, student position, teacher position] of the main variant.
    """

    rows: Tensor
    positions: Tensor
    ours: Windows
    theirs: Windows
    distances: dict[str, Tensor]
    plan: Tensor


@torch.no_grad()
def measure(
    student: DistilledModel, teacher: DistilledModel, rollouts: Rollouts, options: ProbeOptions
) -> tuple[TokenScores, dict[str, Measured]]:
    """Scores of the response tokens [rollout, position], 0 at padding, and the groups "high", "random" and "low"."""
    mask = rollouts.loss_mask.bool()
    ours, theirs = student.read(rollouts), teacher.read(rollouts)
    flat = score_tokens(
        ours.hidden[mask], student.head(), theirs.hidden[mask], teacher.head(), rollouts.response_ids[mask]
    )
    scores = TokenScores(
        *(torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in flat)
    )
    chance = torch.rand(mask.shape, generator=torch.Generator().manual_seed(options.seed)).to(mask.device)
    groups = {}
    for group, ranking in zip(GROUPS, (scores.kl, chance, -scores.kl), strict=True):
        rows, positions = highest_loss(ranking, mask, share=options.share).nonzero(as_tuple=True)
        length = max(options.window_lengths)
        our_windows = student.continue_(rollouts, ours, scores.student_greedy, rows, positions, length)
        their_windows = teacher.continue_(rollouts, theirs, scores.teacher_greedy, rows, positions, length)
        found = {}
        for name, (embedding, cost, k) in zip(
            options.variants, product(options.embeddings, options.costs, options.window_lengths), strict=True
        ):
            short = [Windows(windows.tokens[:, :k], windows.mask[:, :k]) for windows in (our_windows, their_windows)]
            found[name] = near_future_transport(
                short[0], short[1], rollouts, rows, positions, student, teacher, embedding=embedding, cost=cost
            )
        distances = {name: transport.distance.cpu() for name, transport in found.items()}
        plan = found[options.variants[0]].plan.cpu()
        groups[group] = Measured(rows, positions, our_windows, their_windows, distances, plan)
    return scores, groups


def probe(
    student: DistilledModel,
    teacher: DistilledModel,
    rollouts: Rollouts,
    *,
    window_length: int = 50,
    share: float = 0.0225,
    seed: int = 0,
) -> Probe:
    """Measure and conclude at once, for a batch that fits in memory."""
    options = ProbeOptions(share=share, window_lengths=(window_length,), seed=seed)
    scores, groups = measure(student, teacher, rollouts, options)
    distances, origin, losses = {}, {}, {}
    for group, found in groups.items():
        distance = found.distances[options.variants[0]]
        known = distance.isfinite()
        distances[group], origin[group] = distance[known].numpy(), found.rows.cpu()[known].numpy()
        losses[group] = scores.kl[found.rows, found.positions].float().cpu()[known].numpy()
    return Probe(distances, origin, losses)


def probe_records(
    rollouts: Rollouts,
    scores: TokenScores,
    groups: dict[str, Measured],
    decode: Callable[[list[int]], str],
    first: int,
) -> list[dict[str, Any]]:
    """One record a rollout, numbered from `first`: tokens, losses, and every measured place with both windows."""

    def texts(ids: Tensor) -> list[str]:
        return [decode([token]) for token in ids.tolist()]

    records = []
    for row in range(len(rollouts)):
        mask = rollouts.response_mask[row].bool()
        tokens = texts(rollouts.response_ids[row][mask])
        places = []
        for group, found in groups.items():
            for index in (found.rows == row).nonzero().squeeze(-1).tolist():
                position = int(found.positions[index])
                distance = {name: _number(values[index]) for name, values in found.distances.items()}
                places.append({
                    "group": group,
                    "position": position,
                    "token": tokens[position],
                    "token_loss": _number(scores.kl[row, position]),
                    "teacher_nll": _number(scores.teacher_nll[row, position]),
                    "distance": distance,
                    "student_window": texts(found.ours.tokens[index][found.ours.mask[index]]),
                    "teacher_window": texts(found.theirs.tokens[index][found.theirs.mask[index]]),
                    "plan": [[i, j, _number(found.plan[index, i, j])] for i, j in found.plan[index].nonzero().tolist()],
                })  # fmt: skip
        records.append(
            {
                "version": RECORD_VERSION,
                "rollout": first + row,
                "prompt": decode(rollouts.prefix(row, 0).tolist()),
                "tokens": tokens,
                "token_loss": [_number(loss) for loss in scores.kl[row][mask]],
                "places": places,
            }
        )
    return records


def _number(value: Tensor) -> float | None:
    number = float(value)
    return round(number, 6) if numpy.isfinite(number) else None
