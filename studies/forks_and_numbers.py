"""Does D_OT tell forks of content from differences in wording? A check on records of `topd probe`, for word problems.

    topd probe --student lm:student --teacher lm:teacher --share 0.05 --window-length 16 50 --out runs/probe
    python studies/forks_and_numbers.py runs/probe

At each high-loss position the next number of the student's window is compared with the next number of the teacher's. If
they differ, the two models compute something else (content). If they agree, this is a sign, no proof, that only the
wording differs. The numbers are looked for in the longest windows that were measured; where one is missing, or may be
cut at the window's end, the place is left out. Printed: the probability that a place with different numbers has a
larger D_OT than one with equal numbers (AUC; 0.5: D_OT does not separate them), how much better that is than by the
token loss, with 95 % bootstrap intervals over rollouts; and the share of places with different numbers among forks and
false alarms.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import mannwhitneyu

NUMBER = re.compile(r"\d+(?:\.\d+)?(?=[^\d.]|\.\D)")
"""A number that does not end where the window does; the dot behind it may be that of the sentence."""
DRAWS = 2000


def next_number(window: list[str]) -> str | None:
    """The first whole number of a window, if it has one."""
    found = NUMBER.search("".join(window))
    return found and found.group()


def compared(records: list[dict[str, Any]]) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    """(rollout, whether the next numbers differ, place) of the high-loss places where both windows have a number."""
    for record in records:
        for place in record["places"]:
            ours, theirs = next_number(place["student_window"]), next_number(place["teacher_window"])
            if place["group"] == "high" and ours is not None and theirs is not None:
                yield record["rollout"], float(ours) != float(theirs), place


def area(values: numpy.ndarray, differs: numpy.ndarray) -> float:
    """P(value of a place that differs > value of one that does not), ties counted half."""
    if differs.all() or not differs.any():
        return float("nan")
    return float(mannwhitneyu(values[differs], values[~differs]).statistic / (differs.sum() * (~differs).sum()))


def with_interval(
    values: numpy.ndarray, differs: numpy.ndarray, rollouts: numpy.ndarray, minus: numpy.ndarray | None = None
) -> str:
    """The area, or its difference to that of the values `minus`, with its interval over rollouts."""

    def measured(chosen: Any) -> float:
        return area(values[chosen], differs[chosen]) - (0.0 if minus is None else area(minus[chosen], differs[chosen]))

    places = [numpy.flatnonzero(rollouts == rollout) for rollout in numpy.unique(rollouts)]
    generator = numpy.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        drawn = numpy.concatenate([places[i] for i in generator.integers(len(places), size=len(places))])
        draws.append(measured(drawn))
    low, high = numpy.nanquantile(draws, [0.025, 0.975])
    return f"{measured(slice(None)):.2f} ({low:.2f} to {high:.2f})"


def main(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "probe_records.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    found = list(compared(records))
    rollouts, differs = numpy.array([row for row, _, _ in found]), numpy.array([differs for _, differs, _ in found])
    high = sum(place["group"] == "high" for record in records for place in record["places"])
    print(f"{len(records)} rollouts, {high} high-loss places, {len(found)} with a number in both windows;")
    print(f"the next numbers differ at {differs.mean():.1%} of them\n")
    print(f"{'ranked by':32} {'AUC (95 % interval)':24} minus that of the token loss")
    losses = numpy.array([place["token_loss"] for _, _, place in found])
    for name in summary["variants"]:
        if name.split("/")[0] not in ("candidate", "regenerated"):  # whose student windows are others
            values = numpy.array([place["distance"][name] for _, _, place in found], dtype=float)
            known = numpy.isfinite(values)
            parts = values[known], differs[known], rollouts[known]
            print(f"{'D_OT, ' + name:32} {with_interval(*parts):24} {with_interval(*parts, losses[known])}")
    print(f"{'token loss':32} {with_interval(losses, differs, rollouts)}\n")
    fork = numpy.array([place["distance"][summary["variant"]] for _, _, place in found]) > summary["threshold"]
    for name, chosen in (("forks", fork), ("false alarms", ~fork)):
        print(f"{name:13} {chosen.sum():4} places, the next numbers differ at {differs[chosen].mean():.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
