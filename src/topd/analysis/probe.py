"""The probe: how many of a pair's high-loss tokens are false alarms? (Section 2.1, Fig. 2.)

This module measures D_OT at the positions with the highest, the lowest and random token losses of each rollout, equally
many of each: the distance between the student's window and the teacher's greedy continuation of the same prefix. The
paper's text allows three readings of the student's window; the probe measures any of them at the same places.
`probe_summary` computes the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy
import torch
from torch import Tensor

from topd.algorithm import TokenScores, highest_loss
from topd.algorithm.transport import GroundCost
from topd.errors import NonFiniteError
from topd.near_future import DistilledModel, Places, Rollouts, Windows
from topd.paper import GROUPS
from topd.training.method import Embedding, Method, Ranking, StudentWindow, ranking
from topd.training.step import Pair, look_from, near_future_transport, score, student_windows

RECORD_VERSION = 1


@dataclass(frozen=True)
class ProbeOptions:
    """What to measure, with the defaults of `Method`. The first value of each tuple is the main one."""

    share: float = Method.candidate_share  # of a rollout's positions in each group, at least one position
    # K. Windows have the largest; a smaller one uses their first tokens.
    window_lengths: tuple[int, ...] = (Method.window_length,)
    embeddings: tuple[Embedding, ...] = (Method.embedding,)  # as in `TOPDConfig`
    costs: tuple[GroundCost, ...] = (Method.ground_cost,)  # likewise
    seed: int = 0  # for the random positions
    ranking: Ranking = Method.candidate_ranking  # the value that defines high-loss positions
    student_windows: tuple[StudentWindow, ...] = (Method.student_window,)  # readings of the student's window

    @property
    def variants(self) -> dict[str, Method]:
        """All combinations, the main one first, by a name such as "rollout/student/cosine/50"."""
        every = product(self.student_windows, self.embeddings, self.costs, self.window_lengths)
        return {
            f"{window}/{embedding}/{cost}/{k}": Method(
                student_window=window, embedding=embedding, ground_cost=cost, window_length=k
            )
            for window, embedding, cost, k in every
        }

    @property
    def main(self) -> str:
        """Name of the main variant."""
        return next(iter(self.variants))


@dataclass(frozen=True)
class Measured:
    """The positions of one group in a batch of rollouts."""

    places: Places
    ours: dict[StudentWindow, Windows]  # the student's windows, by reading
    theirs: Windows  # the teacher's
    distances: dict[str, Tensor]  # [place] D_OT, by variant; NaN: no distance
    plan: Tensor  # [place, student position, teacher position] of the main variant
    # [place] whether the regenerated window begins with the candidate token; None if not measured
    begins: Tensor | None


@torch.no_grad()
def measure(
    student: DistilledModel, teacher: DistilledModel, rollouts: Rollouts, options: ProbeOptions,
    groups: Sequence[str] = tuple(GROUPS),
) -> tuple[TokenScores, dict[str, Measured]]:  # fmt: skip
    """Scores of the response tokens [rollout, position], 0 at padding; and the groups "high", "random" and "low".

    Raises `NonFiniteError` if a token loss is NaN.
    """
    mask = rollouts.loss_mask.bool()
    kept: StudentWindow = next((kind for kind in options.student_windows if kind != "rollout"), "rollout")
    scores, pair = score(rollouts, student, teacher, Method(student_window=kept))
    if bool(scores.kl[mask].isnan().any()):
        raise NonFiniteError(
            "The token losses of a rollout are NaN: the weights of a model are broken (NaN or infinity), or its dtype "
            "is too small (--dtype float32 or bfloat16)."
        )
    high = ranking(scores, options.ranking)
    low = -high.abs() if options.ranking == "log_ratio" else -high  # a log ratio far below 0 is not agreement
    chance = torch.rand(mask.shape, generator=torch.Generator().manual_seed(options.seed)).to(mask.device)
    found = {}
    for group, order in zip(GROUPS, (high, chance, low), strict=True):
        if group in groups:
            places = Places.marked(rollouts, highest_loss(order, mask, share=options.share))
            found[group] = _measured(places, pair, options)
    return scores, found


def _measured(places: Places, pair: Pair, options: ProbeOptions) -> Measured:
    """All readings of the student's window and all variants of the distance, at the same places."""
    main, length = options.student_windows[0], max(options.window_lengths)
    look = look_from(places, pair, replace(options.variants[options.main], window_length=length))
    ours = {main: look.ours} | {
        kind: student_windows(places, pair, kind, length) for kind in options.student_windows if kind != main
    }
    found = {}
    for name, method in options.variants.items():
        mine, theirs = (each.first(method.window_length) for each in (ours[method.student_window], look.theirs))
        found[name] = near_future_transport(places, mine, theirs, pair, method)
    begins = ours["regenerated"].tokens[:, 0] == places.tokens if "regenerated" in ours else None
    distances = {name: transport.distance.cpu() for name, transport in found.items()}
    return Measured(places, ours, look.theirs, distances, found[options.main].plan.cpu(), begins)


def probe_records(
    rollouts: Rollouts, scores: TokenScores, groups: dict[str, Measured], decode: Callable[[list[int]], str], first: int
) -> list[dict[str, Any]]:
    """One record per rollout, numbered from `first`: tokens, losses, and every measured place with its windows.

    `student_window` is the window of the main reading; `other_windows` has those of the other readings.
    """

    def texts(ids: Tensor) -> list[str]:
        return [decode([token]) for token in ids.tolist()]

    records = []
    for row in range(len(rollouts)):
        mask = rollouts.response_mask[row].bool()
        tokens = texts(rollouts.response_ids[row][mask])
        places = []
        for group, found in groups.items():
            for index in (found.places.rows == row).nonzero().squeeze(-1).tolist():
                position = int(found.places.positions[index])
                windows = {k: texts(w.tokens[index][w.mask[index]]) for k, w in found.ours.items()}
                main, *others = windows
                places.append({
                    "group": group, "position": position, "token": tokens[position],
                    "token_loss": _number(scores.kl[row, position]),
                    "teacher_nll": _number(scores.teacher_nll[row, position]),
                    "distance": {name: _number(values[index]) for name, values in found.distances.items()},
                    "student_window": windows[main],
                    "teacher_window": texts(found.theirs.tokens[index][found.theirs.mask[index]]),
                    "plan": [[i, j, _number(found.plan[index, i, j])] for i, j in found.plan[index].nonzero().tolist()],
                })  # fmt: skip
                if others:
                    places[-1]["other_windows"] = {kind: windows[kind] for kind in others}
                if found.begins is not None:
                    places[-1]["begins_with_candidate"] = bool(found.begins[index])
        records.append({
            "version": RECORD_VERSION, "rollout": first + row, "prompt": decode(rollouts.prefix(row, 0).tolist()),
            "tokens": tokens, "token_loss": [_number(loss) for loss in scores.kl[row][mask]], "places": places,
        })  # fmt: skip
    return records


def _number(value: Tensor) -> float | None:
    number = float(value)
    return round(number, 6) if numpy.isfinite(number) else None
