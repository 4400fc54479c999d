"""What a probe's measurements say: the paper's figures 2 and 6 for any pair, each with a bootstrap interval."""

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
"""D_OT in float32 of windows that are the same in embedding space may be this far above 0."""
Arrays = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Probe:
    """D_OT at high-loss, random and low-loss positions, and what else is known of each place.

    Attributes:
        distances: by group "high", "random" and "low", D_OT of each place.
        rollout: by group, the rollout that each place belongs to.
        loss: by group, the token loss (reverse KL) at each place, nats; None where only distances are known.
        teacher_nll: by group, the teacher's NLL of the sampled token, nats: the x axis of Fig. 6. None: not known.
        begins: by group, 1 where the student's regenerated window begins with the candidate token. None: not measured.
    """

    distances: Arrays
    rollout: Arrays
    loss: Arrays | None = None
    teacher_nll: Arrays | None = None
    begins: Arrays | None = None

    @classmethod
    def of_records(cls, records: Iterable[dict[str, Any]], variant: str) -> Probe:
        """From `probe_records`; places without a distance are left out."""
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
        """Share of high-loss positions with D_OT at most the upper quartile of the low-loss ones.

        By construction some 75 % of the low-loss ones are (more where distances tie).
        """
        return float((self.distances["high"] <= self.threshold + ROUNDING).mean())

    @property
    def pearson(self) -> float:
        """Correlation of token loss and D_OT over high-loss positions; NaN where one of them never changes."""
        return _correlation(self._known("loss")["high"], self.distances["high"])

    @property
    def spearman(self) -> float:
        """The same for ranks."""
        return _rank_correlation(self._known("loss")["high"], self.distances["high"])

    @property
    def pearson_nll(self) -> float:
        """Correlation of the teacher's NLL and D_OT over high-loss positions (Fig. 6), where the NLL is finite."""
        return _correlation(self._known("teacher_nll")["high"], self.distances["high"])

    @property
    def spearman_nll(self) -> float:
        """The same for ranks."""
        return _rank_correlation(self._known("teacher_nll")["high"], self.distances["high"])

    def near_zero(self, group: str) -> float:
        """Share of a group's places with D_OT < 0.02, the first bin of Fig. 2a."""
        return float((self.distances[group] < NEAR_ZERO).mean())

    def _known(self, name: str) -> Arrays:
        values: Arrays | None = getattr(self, name)
        if values is None:
            raise ValueError(f"This probe does not hold `{name}`. Read it from records, or measure it.")
        return values

    def resampled(self, rng: numpy.random.Generator) -> Probe:
        """Rollouts drawn anew, with everything that belongs to them."""
        known = numpy.unique(numpy.concatenate([self.rollout[group] for group in self.rollout]))
        counts = numpy.bincount(rng.choice(known, len(known)), minlength=int(known.max()) + 1)
        times = {group: counts[origin] for group, origin in self.rollout.items()}

        def drawn(values: Arrays | None) -> Any:
            return None if values is None else {g: numpy.repeat(each, times[g]) for g, each in values.items()}

        return Probe(**{field.name: drawn(getattr(self, field.name)) for field in fields(self)})

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
        """Each group's quartiles and share near 0, correlations, false-alarm share, with 95 % intervals; threshold."""
        found = self.intervals(
            {f"median/{group}": partial(_median_of, group) for group in GROUPS}
            | {f"near_zero/{group}": partial(_near_zero_of, group) for group in GROUPS}
            | ({f"begins/{group}": partial(_begins_of, group) for group in GROUPS} if self.begins else {})
            | {name: attrgetter(name) for name in CORRELATIONS}
            | {"false_alarm_share": attrgetter("false_alarm_share")},
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
                "near_zero": found.pop(f"near_zero/{group}"),
            }  # fmt: skip
            if self.begins:
                groups[group]["begins_with_candidate"] = found.pop(f"begins/{group}")
        return {"groups": groups, **found, "low_loss_share": float((self.distances["low"] <= self.threshold).mean()),
                "threshold": self.threshold}  # fmt: skip


def _median_of(group: str, probe: Probe) -> float:
    return float(numpy.median(probe.distances[group]))


def _near_zero_of(group: str, probe: Probe) -> float:
    return probe.near_zero(group)


def _begins_of(group: str, probe: Probe) -> float:
    return float(probe._known("begins")[group].mean())


def _rank_correlation(a: numpy.ndarray, b: numpy.ndarray) -> float:
    known = numpy.isfinite(a)
    return _correlation(rankdata(a[known]), rankdata(b[known]))


def _correlation(a: numpy.ndarray, b: numpy.ndarray) -> float:
    known = numpy.isfinite(a)
    a, b = a[known], b[known]
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
