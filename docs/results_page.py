"""Fills the tables of docs/results.md from studies/results/*.json: python docs/results_page.py

A table stands between `<!-- table: STUDY KIND ... -->` and `<!-- end -->`:
`STUDY greedy|sampled ARM` (every arm beside ARM), `STUDY tuning`, `STUDY curve ARM; ARM; ...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from topd.study.summary import read_study, study_rows

PAGE = Path(__file__).with_name("results.md")
STUDIES = Path(__file__).parents[1] / "studies" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\w+)(?: ([^\n>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def results_page(text: str) -> str:
    """The page with every table as its study says."""
    return PLACE.sub(lambda place: place[1] + _table(place[2], place[3], place[4]) + place[5], text)


def _table(study: str, kind: str, more: str | None) -> str:
    result = read_study(STUDIES / f"{study}.json")
    if kind == "tuning":
        return _tuning(result)
    if kind == "curve":
        return _curve(result, str(more).split("; "))
    arm = more or "opd"
    head = [kind, "accuracy", f"minus {arm}, points", "p (Holm)", "seeds ahead", "processor seconds"]
    return markdown(head, study_rows(result, kind, arm))


def _tuning(result: Mapping[str, Any]) -> str:
    rows = []
    for arm, scores in result["tuning"].items():
        tried = ", ".join(f"{100 * each['accuracy']:.1f}" for each in scores)
        rows.append([arm, _words(result["tuned"][arm]), tried])
    return markdown(["arm", "chosen", "sampled accuracy of each choice, %"], rows)


def _words(choice: Mapping[str, Any]) -> str:
    short = {"learning_rate": "lr", "guidance_weight": "lambda"}
    return ", ".join(
        f"{short.get(name, name)} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in choice.items()
    )


def _curve(result: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Means over seeds: greedy accuracy by the first arm's steps, and tokens and seconds at the last one.

    What not every seed of an arm has is left empty.
    """
    curves = {
        arm: [{int(point["step"]): point for point in seed} for seed in result["arms"][arm]["curve"].values()]
        for arm in arms
    }
    steps = sorted(set().union(*curves[arms[0]]))
    rows = []
    for arm, seeds in curves.items():
        cells = [("accuracy", step, "{:.1%}") for step in steps]
        cells += [("tokens", steps[-1], "{:,.0f}"), ("seconds", steps[-1], "{:.0f}")]
        rows.append([arm, *(_mean(seeds, *cell) for cell in cells)])
    return markdown(["step", *map(str, steps), f"tokens by step {steps[-1]}", "processor seconds"], rows)


def _mean(seeds: Sequence[Mapping[int, Any]], name: str, step: int, form: str) -> str:
    return form.format(fmean(seed[step][name] for seed in seeds)) if all(step in seed for seed in seeds) else ""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    PAGE.write_text(results_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
