"""How many of a pair's high-loss tokens are false alarms? (Section 2.1, Fig. 2.) Measuring; `probe_summary` concludes.

At the highest, the lowest and random token losses of each rollout, equally many of each, the teacher continues the
student's prefix greedily, and D_OT is the distance of the student's window to the teacher's. What the student's window
is can be read in three ways; the probe measures as many of them as wanted, at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy
import torch
from torch import Tensor

from topd.algorithm import TokenScores, highest_loss
from topd.algorithm.candidates import PAPER_SHARE
from topd.algorithm.transport import GroundCost
from topd.analysis.probe_summary import Probe
from topd.near_future import DistilledModel, Places, Rollouts, Windows
from topd.near_future.matching import Embedding
from topd.paper import GROUPS
from topd.training.choices import ranking
from topd.training.method import Method, Ranking, StudentWindow
from topd.training.step import Pair, futures, look_from, score, student_windows

RECORD_VERSION = 1


@dataclass(frozen=True)
class ProbeOptions:
    """What is measured. The first of each is the main one; the others are measured at the same places.

    Attributes:
        share: of a rollout's positions in each group, at least one.
        window_lengths: K. Windows have the longest; a shorter one is its beginning.
        embeddings, costs: as in `TOPDConfig`.
        seed: of the random positions.
        ranking: what makes a position high-loss.
        student_windows: readings of the student's window.
    """

    share: float = PAPER_SHARE
    window_lengths: tuple[int, ...] = (50,)
    embeddings: tuple[Embedding, ...] = ("student",)
    costs: tuple[GroundCost, ...] = ("cosine",)
    seed: int = 0
    ranking: Ranking = "reverse_kl"
    student_windows: tuple[StudentWindow, ...] = ("rollout",)

    @property
    def variants(self) -> dict[str, tuple[StudentWindow, Embedding, GroundCost, int]]:
        """By a name such as "rollout/student/cosine/50", the main one first."""
        every = product(self.student_windows, self.embeddings, self.costs, self.window_lengths)
        return {"/".join(map(str, variant)): variant for variant in every}

    @property
    def main(self) -> str:
        """The main variant's name."""
        return next(iter(self.variants))

    @property
    def readings(self) -> dict[StudentWindow, str]:
        """Of each reading of the student's window, the variant that otherwise is the main one."""
        rest = self.main.partition("/")[2]
        return {window: f"{window}/{rest}" for window in self.student_windows}


@dataclass(frozen=True)
class Measured:
    """One group's positions in a batch of rollouts.

    Attributes:
        places: where they are.
        ours: by reading, the student's windows.
        theirs: the teacher's window at each.
        distances: by variant, [place] D_OT; NaN where there is none.
        plan: [place, student position, teacher position] of the main variant.
        begins: [place] whether the regenerated window begins with the candidate token; None where it is not measured.
    """

    places: Places
    ours: dict[StudentWindow, Windows]
    theirs: Windows
    distances: dict[str, Tensor]
    plan: Tensor
    begins: Tensor | None


@torch.no_grad()
def measure(
    student: DistilledModel, teacher: DistilledModel, rollouts: Rollouts, options: ProbeOptions,
    groups: Sequence[str] = tuple(GROUPS),
) -> tuple[TokenScores, dict[str, Measured]]:  # fmt: skip
    """Scores of the response tokens [rollout, position], 0 at padding, and the groups "high", "random" and "low"."""
    mask = rollouts.loss_mask.bool()
    kept: StudentWindow = next((kind for kind in options.student_windows if kind != "rollout"), "rollout")
    scores, pair = score(rollouts, student, teacher, Method(student_window=kept))
    high = ranking(scores, options.ranking)
    low = -high.abs() if options.ranking == "log_ratio" else -high  # a log ratio far below 0 is no agreement
    chance = torch.rand(mask.shape, generator=torch.Generator().manual_seed(options.seed)).to(mask.device)
    found = {}
    for group, order in zip(GROUPS, (high, chance, low), strict=True):
        if group in groups:
            places = Places.marked(rollouts, highest_loss(order, mask, share=options.share))
            found[group] = _measured(places, pair, options)
    return scores, found


def _measured(places: Places, pair: Pair, options: ProbeOptions) -> Measured:
    """All readings of the student's window, and all variants of the distance, at the same places."""
    (main_kind, *_), *_ = options.variants.values()
    length = max(options.window_lengths)
    look = look_from(places, pair, Method(window_length=length, student_window=main_kind))
    ours = {main_kind: look.ours} | {
        kind: student_windows(places, pair, kind, length) for kind in options.student_windows if kind != main_kind
    }
    found = {}
    for name, (kind, embedding, cost, k) in options.variants.items():
        method = Method(embedding=embedding, ground_cost=cost)
        found[name] = futures(places, ours[kind].first(k), look.theirs.first(k), pair, method).transport
    begins = ours["regenerated"].tokens[:, 0] == places.tokens if "regenerated" in ours else None
    distances = {name: transport.distance.cpu() for name, transport in found.items()}
    return Measured(places, ours, look.theirs, distances, found[options.main].plan.cpu(), begins)


def probe(
    student: DistilledModel,
    teacher: DistilledModel,
    rollouts: Rollouts,
    *,
    window_length: int = 50,
    share: float = PAPER_SHARE,
    student_window: StudentWindow = "rollout",
    seed: int = 0,
) -> Probe:
    """Measure and conclude at once, for a batch that fits in memory."""
    options = ProbeOptions(share=share, window_lengths=(window_length,), student_windows=(student_window,), seed=seed)
    scores, groups = measure(student, teacher, rollouts, options)
    distances, origin, losses = {}, {}, {}
    for group, found in groups.items():
        distance = found.distances[options.main]
        known = distance.isfinite()
        distances[group], origin[group] = distance[known].numpy(), found.places.rows.cpu()[known].numpy()
        losses[group] = found.places.at(scores.kl).float().cpu()[known].numpy()
    return Probe(distances, origin, losses)


def probe_records(
    rollouts: Rollouts,
    scores: TokenScores,
    groups: dict[str, Measured],
    decode: Callable[[list[int]], str],
    first: int,
) -> list[dict[str, Any]]:
    """One record per rollout, numbered from `first`: tokens, losses, and every measured place with its windows.

    `student_window` is the main reading's; `other_windows` has those of the others.
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
                    "group": group,
                    "position": position,
                    "token": tokens[position],
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
