"""Statistics of a probe: the values of the paper's figures 2 and 6 for any pair, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.stats import rankdata

from topd.paper import GROUPS, NEAR_ZERO


@dataclass(frozen=True)
class Group:
    """[place] measurements of one group of positions."""

    distances: numpy.ndarray  # D_OT
    rollout: numpy.ndarray
    loss: numpy.ndarray  # the token loss (reverse KL), nats
    teacher_nll: numpy.ndarray  # the teacher's NLL of the sampled token, nats: the x axis of Fig. 6; NaN: unknown
    begins: numpy.ndarray  # 1 if the student's regenerated window begins with the candidate token; NaN: not measured


Probe = dict[str, Group]
"""Measurements at high-loss, random and low-loss positions, by "high", "random" and "low"."""


def probe_of(records: Iterable[dict[str, Any]], variant: str) -> Probe:
    """From `probe_records`, without the places that have no distance."""
    rows: dict[str, list[tuple[Any, ...]]] = {group: [] for group in GROUPS}
    begins = variant.startswith("regenerated/")
    for record in records:
        for place in record["places"]:
            distance, loss, nll = place["distance"].get(variant), place["token_loss"], place["teacher_nll"]
            if distance is not None and loss is not None:
                begun = place["begins_with_candidate"] if begins else None
                rows[place["group"]].append((distance, record["rollout"], loss, nll, begun))
    tables = {group: numpy.array(values, dtype=float).reshape(-1, 5).T for group, values in rows.items()}
    return {group: Group(table[0], table[1].astype(int), *table[2:]) for group, table in tables.items()}


def threshold(probe: Probe) -> float:
    """Upper quartile of D_OT at low-loss positions."""
    return float(numpy.quantile(probe["low"].distances, 0.75))


def false_alarm_share(probe: Probe) -> float:
    """Share of high-loss positions with D_OT up to the upper quartile of the low-loss positions.

    By construction this share is about 75 % for low-loss positions, or more if distances tie.
    """
    return float((probe["high"].distances <= threshold(probe)).mean())


def correlations(high: Group) -> dict[str, float]:
    """Of token loss and D_OT, and of the teacher's NLL and D_OT (Fig. 6), by value and by rank.

    Over positions with a finite value; NaN if one of both is constant.
    """
    found = {}
    for suffix, values in (("", high.loss), ("_nll", high.teacher_nll)):
        finite = numpy.isfinite(values)
        for name, scale in (("pearson", numpy.asarray), ("spearman", rankdata)):
            a, b = scale(values[finite]), scale(high.distances[finite])
            varies = len(a) > 1 and a.std() > 0 and b.std() > 0
            found[name + suffix] = float(numpy.corrcoef(a, b)[0, 1]) if varies else float("nan")
    return found


def of_group(group: Group) -> dict[str, float]:
    """Median D_OT, share of D_OT in the first bin of Fig. 2a, share of windows that begin with the candidate token."""
    found = {"median": float(numpy.median(group.distances)), "near_zero": float((group.distances < NEAR_ZERO).mean())}
    measured = not numpy.isnan(group.begins).any()
    return found | ({"begins_with_candidate": float(group.begins.mean())} if measured else {})


def statistics(probe: Probe) -> dict[str, float]:
    """All of these, those of a group as "GROUP/NAME"."""
    by_group = {f"{name}/{key}": value for name in GROUPS for key, value in of_group(probe[name]).items()}
    return by_group | correlations(probe["high"]) | {"false_alarm_share": false_alarm_share(probe)}


def resampled(probe: Probe, rng: numpy.random.Generator) -> Probe:
    """A bootstrap sample: rollouts drawn with replacement, with all their places."""
    known = numpy.unique(numpy.concatenate([group.rollout for group in probe.values()]))
    counts = numpy.bincount(rng.choice(known, len(known)), minlength=int(known.max()) + 1)

    def drawn(group: Group) -> Group:
        return Group(*(numpy.repeat(values, counts[group.rollout]) for values in vars(group).values()))

    return {name: drawn(group) for name, group in probe.items()}


def summary(probe: Probe, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Quartiles and share near 0 per group, correlations and false-alarm share; threshold.

    Intervals (95 %) are percentiles of a bootstrap, whose unit is the rollout.
    """
    rng, tail = numpy.random.default_rng(seed), (1 - 0.95) / 2
    drawn = [statistics(resampled(probe, rng)) for _ in range(samples)]
    found: dict[str, dict[str, float]] = {}
    for name, value in statistics(probe).items():
        values = numpy.array([each[name] for each in drawn])
        values = values[~numpy.isnan(values)]  # a correlation of equal values
        low, high = numpy.quantile(values, [tail, 1 - tail]) if len(values) else (numpy.nan, numpy.nan)
        found[name] = {"value": value, "low": float(low), "high": float(high)}
    groups: dict[str, Any] = {}
    for name, group in probe.items():
        q1, q3 = numpy.quantile(group.distances, [0.25, 0.75])
        own = {key: found.pop(f"{name}/{key}") for key in of_group(group)}
        median = own.pop("median")
        groups[name] = {
            "median": median["value"], "low": median["low"], "high": median["high"],
            "q1": float(q1), "q3": float(q3), "n": len(group.distances), **own,
        }  # fmt: skip
    low_loss_share = float((probe["low"].distances <= threshold(probe)).mean())
    return {"groups": groups, **found, "low_loss_share": low_loss_share, "threshold": threshold(probe)}


def token_table(records: Iterable[dict[str, Any]], variant: str, threshold: float) -> list[dict[str, Any]]:
    """How often each high-loss token was a false alarm, for tokens that occur at least three times, by frequency."""
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
        if n >= 3
    ]
