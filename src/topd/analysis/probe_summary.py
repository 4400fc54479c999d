"""Statistics of a probe: the values of the paper's figures 2 and 6 for any pair, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from typing import Any

import numpy
from scipy.stats import rankdata

from topd.paper import CORRELATIONS, GROUPS, NEAR_ZERO

ROUNDING = 1e-6
"""D_OT (float32) of windows that are equal in embedding space can be this far above 0."""
Arrays = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Probe:
    """Measurements at high-loss, random and low-loss positions, each by group "high", "random" and "low"."""

    distances: Arrays  # D_OT of each place
    rollout: Arrays  # the rollout of each place
    loss: Arrays | None = None  # the token loss (reverse KL) at each place, nats; None: unknown
    # the teacher's NLL of the sampled token, nats: the x axis of Fig. 6; None: unknown.
    teacher_nll: Arrays | None = None
    # 1 if the student's regenerated window begins with the candidate token; None: not measured
    begins: Arrays | None = None

    @classmethod
    def of_records(cls, records: Iterable[dict[str, Any]], variant: str) -> Probe:
        """From `probe_records`, without the places that have no distance."""
        rows: dict[str, list[tuple[float, ...]]] = {group: [] for group in GROUPS}
        begins = variant.startswith("regenerated/")
        for record in records:
            for place in record["places"]:
                distance, loss, nll = place["distance"].get(variant), place["token_loss"], place["teacher_nll"]
                if distance is not None and loss is not None:
                    begun = place["begins_with_candidate"] if begins else False
                    nll = float("nan") if nll is None else nll
                    rows[place["group"]].append((distance, record["rollout"], loss, nll, begun))
        columns = {group: numpy.array(values, dtype=float).reshape(-1, 5).T for group, values in rows.items()}

        def column(number: int) -> Arrays:
            return {group: table[number] for group, table in columns.items()}

        rollout = {group: origin.astype(int) for group, origin in column(1).items()}
        return cls(column(0), rollout, column(2), column(3), column(4) if begins else None)

    @property
    def threshold(self) -> float:
        """Upper quartile of D_OT at low-loss positions."""
        return float(numpy.quantile(self.distances["low"], 0.75))

    @property
    def false_alarm_share(self) -> float:
        """Share of high-loss positions with D_OT up to the upper quartile of the low-loss positions.

        By construction this share is about 75 % for low-loss positions, or more if distances tie.
        """
        return float((self.distances["high"] <= self.threshold + ROUNDING).mean())

    @property
    def pearson(self) -> float:
        """Correlation of token loss and D_OT over high-loss positions; NaN if one of them is constant."""
        return self._correlation("loss")

    @property
    def spearman(self) -> float:
        """The same for ranks."""
        return self._correlation("loss", rankdata)

    @property
    def pearson_nll(self) -> float:
        """Correlation of the teacher's NLL and D_OT over high-loss positions with a finite NLL (Fig. 6)."""
        return self._correlation("teacher_nll")

    @property
    def spearman_nll(self) -> float:
        """The same for ranks."""
        return self._correlation("teacher_nll", rankdata)

    def _correlation(self, name: str, scale: Callable[[numpy.ndarray], numpy.ndarray] = numpy.asarray) -> float:
        values, distances = self._known(name)["high"], self.distances["high"]
        finite = numpy.isfinite(values)
        a, b = scale(values[finite]), scale(distances[finite])
        return float(numpy.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else float("nan")

    def median(self, group: str) -> float:
        """Median D_OT of a group."""
        return float(numpy.median(self.distances[group]))

    def near_zero(self, group: str) -> float:
        """Share of a group's places with D_OT < 0.02, the first bin of Fig. 2a."""
        return float((self.distances[group] < NEAR_ZERO).mean())

    def begins_with_candidate(self, group: str) -> float:
        """Share of a group's places whose regenerated window begins with the candidate token."""
        return float(self._known("begins")[group].mean())

    def _known(self, name: str) -> Arrays:
        values: Arrays | None = getattr(self, name)
        if values is None:
            raise ValueError(f"This probe has no `{name}`. Create it with `Probe.of_records`.")
        return values

    def resampled(self, rng: numpy.random.Generator) -> Probe:
        """A bootstrap sample: rollouts drawn with replacement, with all their places."""
        known = numpy.unique(numpy.concatenate([self.rollout[group] for group in self.rollout]))
        counts = numpy.bincount(rng.choice(known, len(known)), minlength=int(known.max()) + 1)
        times = {group: counts[origin] for group, origin in self.rollout.items()}

        def drawn(values: Arrays | None) -> Any:
            return None if values is None else {g: numpy.repeat(each, times[g]) for g, each in values.items()}

        return Probe(**{field.name: drawn(getattr(self, field.name)) for field in fields(self)})

    def intervals(
        self, statistics: dict[str, Callable[[Probe], float]], samples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> dict[str, dict[str, float]]:
        """Value and percentile bootstrap interval of each statistic. The unit of resampling is the rollout."""
        rng = numpy.random.default_rng(seed)
        drawn: dict[str, list[float]] = {name: [] for name in statistics}
        for _ in range(samples):
            again = self.resampled(rng)
            for name, statistic in statistics.items():
                drawn[name].append(statistic(again))
        tail = (1 - level) / 2
        return {
            name: {
                "value": statistic(self),
                "low": float(numpy.nanquantile(drawn[name], tail)),
                "high": float(numpy.nanquantile(drawn[name], 1 - tail)),
            }
            for name, statistic in statistics.items()
        }

    def summary(self, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Quartiles and share near 0 per group, correlations and false-alarm share with 95 % intervals; threshold."""
        by_group = {"median": Probe.median, "near_zero": Probe.near_zero}
        if self.begins:
            by_group["begins_with_candidate"] = Probe.begins_with_candidate
        found = self.intervals(
            {f"{name}/{group}": partial(of, group=group) for name, of in by_group.items() for group in GROUPS}
            | {name: attrgetter(name) for name in (*CORRELATIONS, "false_alarm_share")},
            samples,
            seed=seed,
        )
        groups = {}
        for group, distances in ((group, self.distances[group]) for group in GROUPS):
            q1, q3 = numpy.quantile(distances, [0.25, 0.75])
            of_group = {name: found.pop(f"{name}/{group}") for name in by_group}
            median = of_group.pop("median")
            groups[group] = {
                "median": median["value"], "low": median["low"], "high": median["high"],
                "q1": float(q1), "q3": float(q3), "n": len(distances), **of_group,
            }  # fmt: skip
        return {"groups": groups, **found, "low_loss_share": float((self.distances["low"] <= self.threshold).mean()),
                "threshold": self.threshold}  # fmt: skip


def token_table(
    records: Iterable[dict[str, Any]], variant: str, threshold: float, least: int = 3
) -> list[dict[str, Any]]:
    """How often each high-loss token was a false alarm, for tokens that occur at least `least` times, by frequency."""
    alarms: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for record in records:
        for place in record["places"]:
            distance = place["distance"].get(variant)
            if place["group"] == "high" and distance is not None:
                total[place["token"]] += 1
                alarms[place["token"]] += distance <= threshold
    return [
        {"token": token, "n": n, "false_alarms": alarms[token], "forks": n - alarms[token]}
        for token, n in total.most_common()
        if n >= least
    ]
