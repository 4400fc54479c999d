"""What a probe's measurements say: the paper's figures 2 and 6 for any pair, each with a bootstrap interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.stats import rankdata

ROUNDING = 1e-6
"""D_OT in float32 of windows that are the same in embedding space may be this far above 0."""
GROUPS = ("high", "random", "low")
Arrays = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Probe:
    """D_OT at high-loss, random and low-loss positions.

    Attributes:
        distances: by group "high", "random" and "low", D_OT of each place.
        rollout: by group, the rollout that each place belongs to.
        loss: by group, the token loss at each place, nats; None where only distances are known.
    """

    distances: Arrays
    rollout: Arrays
    loss: Arrays | None = None

    @classmethod
    def of_records(cls, records: Iterable[dict[str, Any]], variant: str) -> Probe:
        """From `probe_records`; places without a distance are left out."""
        rows: dict[str, list[tuple[float, int, float]]] = {group: [] for group in GROUPS}
        for record in records:
            for place in record["places"]:
                distance, loss = place["distance"].get(variant), place["token_loss"]
                if distance is not None and loss is not None:
                    rows[place["group"]].append((distance, record["rollout"], loss))
        columns = {group: numpy.array(values, dtype=float).reshape(-1, 3).T for group, values in rows.items()}
        return cls(
            {group: table[0] for group, table in columns.items()},
            {group: table[1].astype(int) for group, table in columns.items()},
            {group: table[2] for group, table in columns.items()},
        )

    @property
    def threshold(self) -> float:
        """Upper quartile of D_OT at low-loss positions."""
        return float(numpy.quantile(self.distances["low"], 0.75))

    @property
    def false_alarm_share(self) -> float:
        """Share of high-loss positions with D_OT at most the upper quartile of the low-loss ones.

        By construction at least 75 % of the low-loss ones are.
        """
        return float((self.distances["high"] <= self.threshold + ROUNDING).mean())

    @property
    def pearson(self) -> float:
        """Correlation of token loss and D_OT over high-loss positions; NaN where one of them never changes."""
        return _correlation(self._loss["high"], self.distances["high"])

    @property
    def spearman(self) -> float:
        """The same for ranks."""
        return _correlation(rankdata(self._loss["high"]), rankdata(self.distances["high"]))

    @property
    def _loss(self) -> Arrays:
        if self.loss is None:
            raise ValueError("This probe holds distances only, no losses.")
        return self.loss

    def resampled(self, rng: numpy.random.Generator) -> Probe:
        """Rollouts drawn anew, with everything that belongs to them."""
        known = numpy.unique(numpy.concatenate([self.rollout[group] for group in self.rollout]))
        counts = numpy.bincount(rng.choice(known, len(known)), minlength=int(known.max()) + 1)
        times = {group: counts[origin] for group, origin in self.rollout.items()}

        def drawn(values: Arrays) -> Arrays:
            return {group: numpy.repeat(each, times[group]) for group, each in values.items()}

        return Probe(drawn(self.distances), drawn(self.rollout), None if self.loss is None else drawn(self.loss))

    def intervals(
        self, statistics: dict[str, Callable[[Probe], float]], samples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> dict[str, dict[str, float]]:
        """Value and percentile bootstrap interval of each statistic; rollouts are the unit that is drawn."""
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

    def interval(self, samples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the false-alarm share: the threshold is drawn anew with the rollouts."""
        found = self.intervals({"share": lambda probe: probe.false_alarm_share}, samples, level, seed)["share"]
        return found["low"], found["high"]

    def summary(self, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Quartiles of each group, correlations, false-alarm share, with 95 % intervals, and the threshold."""
        found = self.intervals(
            {f"median/{group}": _median_of(group) for group in GROUPS}
            | {
                "pearson": lambda probe: probe.pearson,
                "spearman": lambda probe: probe.spearman,
                "false_alarm_share": lambda probe: probe.false_alarm_share,
            },
            samples,
            seed=seed,
        )
        groups = {}
        for group in GROUPS:
            q1, q3 = numpy.quantile(self.distances[group], [0.25, 0.75])
            median = found.pop(f"median/{group}")
            groups[group] = {
                "median": median["value"], "low": median["low"], "high": median["high"],
                "q1": float(q1), "q3": float(q3), "n": len(self.distances[group]),
            }  # fmt: skip
        return {"groups": groups, **found, "low_loss_share": float((self.distances["low"] <= self.threshold).mean()),
                "threshold": self.threshold}  # fmt: skip


def _median_of(group: str) -> Callable[[Probe], float]:
    return lambda probe: float(numpy.median(probe.distances[group]))


def _correlation(a: numpy.ndarray, b: numpy.ndarray) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(numpy.corrcoef(a, b)[0, 1])


def token_table(
    records: Iterable[dict[str, Any]], variant: str, threshold: float, least: int = 3
) -> list[dict[str, Any]]:
    """High-loss tokens that occur at least `least` times: how often each was a false alarm. Most frequent first."""
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
