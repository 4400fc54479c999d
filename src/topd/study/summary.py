"""Summary of a study's records, and its tables: accuracy of each arm, and its difference from OPD or any other arm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.special import stdtrit

from topd.errors import TOPDError
from topd.evaluation.accuracy import holm
from topd.evaluation.statistics import Floats, sign_flip_p
from topd.evaluation.tables import open_table, plain
from topd.runs.files import read_json
from topd.study.config import REFERENCE
from topd.version import STUDY_VERSION

WAYS = ("greedy", "sampled")


def summarise(right: Mapping[str, Mapping[int, Sequence[float]]], reference: str = REFERENCE) -> dict[str, Any]:
    """Each arm's accuracy and difference from a reference arm.

    `right`: by arm and training seed, 0 or 1 for each held-out problem (the same problems for all).

    Returns, by arm: `seeds`, `accuracy` {mean, low, high, by_seed}, and for all but the reference `beside_opd` (with
    the reference's name) {mean, low, high, p, p_holm, seeds, ahead}, over the seeds that both arms have. Intervals
    (95 %) are over seeds and problems, see `crossed_interval`. p is of a sign-flip test over seeds, see `sign_flip_p`;
    with n seeds it is at least 2 / 2^n. p_holm is adjusted for the number of comparisons (Holm).
    """
    found: dict[str, Any] = {}
    key = f"beside_{reference}"
    for arm, by_seed in right.items():
        table = np.array([by_seed[each] for each in sorted(by_seed)], dtype=float)
        low, high = crossed_interval(table)
        accuracy = {"mean": float(table.mean()), "low": max(low, 0.0), "high": min(high, 1.0)}
        found[arm] = {"seeds": sorted(by_seed), "accuracy": accuracy | {"by_seed": table.mean(1).tolist()}}
        common = sorted(by_seed.keys() & right.get(reference, {}).keys())
        if arm == reference or not common:
            continue
        ours, theirs = (np.array([side[each] for each in common], float) for side in (by_seed, right[reference]))
        difference = ours - theirs
        low, high = crossed_interval(difference)
        means = difference.mean(1)
        p = sign_flip_p(means, 20_000, np.random.default_rng(0))
        found[arm][key] = {
            "mean": float(difference.mean()), "low": low, "high": high, "p": p,
            "seeds": common, "ahead": int((means > 0).sum()),
        }  # fmt: skip
    compared = [arm for arm in found if key in found[arm]]
    for arm, p in zip(compared, holm([found[arm][key]["p"] for arm in compared]), strict=True):
        found[arm][key]["p_holm"] = p
    return found


def answers(result: Mapping[str, Any], how: str) -> dict[str, dict[int, list[int]]]:
    """By arm and seed, 0 or 1 for each held-out problem, from `study.json`."""
    return {
        name: {int(seed): [int(each) for each in ways[how]] for seed, ways in arm["right"].items()}
        for name, arm in result["arms"].items()
    }


def crossed_interval(table: Floats) -> tuple[float, float]:
    """95 % interval of the mean of a [seed, problem] table with both factors random and crossed.

    The variance is (MS_seeds + MS_problems - MS_rest) / (seeds problems), from the two-way analysis of variance, with
    Satterthwaite's degrees of freedom. Our choice: a bootstrap over rows and columns counts the rest three times, and
    covers 96 to 100 %, compared with 94 to 97 % here (98 to 99 % if neither seeds nor problems differ). With one seed
    only problems are random, and the interval does not cover other seeds.
    """
    rows, columns = table.shape
    mean = float(table.mean())
    if columns == 1 or (rows == 1 and np.ptp(table) == 0):
        return mean, mean
    of_problems = rows * table.mean(0).var(ddof=1)
    if rows == 1:
        total, freedom = of_problems, float(columns - 1)
    else:
        of_seeds = columns * table.mean(1).var(ddof=1)
        rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + mean
        of_rest = float((rest**2).sum()) / ((rows - 1) * (columns - 1))
        total = max(of_seeds + of_problems - of_rest, of_rest)
        parts = of_seeds**2 / (rows - 1) + of_problems**2 / (columns - 1) + of_rest**2 / ((rows - 1) * (columns - 1))
        freedom = max(1.0, total**2 / parts) if parts else 1.0
    half = float(stdtrit(freedom, 0.975)) * float(total / (rows * columns)) ** 0.5
    return mean - half, mean + half


def read_study(file: Path) -> dict[str, Any]:
    """Read a `study.json`. Raises `TOPDError` if it cannot be read or has another format."""
    result = read_json(file, "Give a study.json that `topd study` wrote.")
    if not isinstance(result, dict) or result.get("version") != STUDY_VERSION or "arms" not in result:
        raise TOPDError(
            f"{file} is not a study.json of version {STUDY_VERSION}. Run the study again: finished runs are reused."
        )
    return result


def print_tables(result: dict[str, Any], against: str = REFERENCE) -> None:
    """Print both tables, greedy and sampled. Raises `TOPDError` if there is no such arm."""
    if against not in result["arms"]:
        raise TOPDError(f"There is no arm {against!r} in this study; available: {', '.join(result['arms'])}.")
    for how in WAYS:
        title = f"{how}, {result['plan']['held_out']} held-out problems, 95 % intervals over seeds and problems"
        table = open_table(("", "accuracy", f"minus {against}, points", "p (Holm)", "ahead", "s"), title)
        for row in study_rows(result, how, against):
            table.add_row(*map(plain, row))
        Console(width=max(112, Console().width)).print(table)


def study_rows(result: Mapping[str, Any], how: str, against: str = REFERENCE) -> list[list[str]]:
    """One row per arm: name, accuracy and difference with intervals, adjusted p, seeds ahead, seconds."""
    if against == REFERENCE:
        found = {name: arm[how] for name, arm in result["arms"].items()}
    else:
        found = summarise(answers(result, how), against)
    rows = []
    for name, arm in found.items():
        accuracy, difference = arm["accuracy"], arm.get(f"beside_{against}")
        seconds = list(result["arms"][name]["seconds_training"].values())
        compared = ["", "", f"{len(arm['seeds'])} seed{'s' * (len(arm['seeds']) != 1)}"]
        if difference:
            gain = f"{100 * difference['mean']:+.1f} ({_range(difference, '+')})"
            ahead = f"{difference['ahead']}/{len(difference['seeds'])}"
            compared = [gain, f"{difference['p_holm']:.2g}", ahead]
        right = f"{accuracy['mean']:.1%} ({_range(accuracy)})"
        rows.append([name, right, *compared, f"{sum(seconds) / len(seconds):.0f}"])
    return rows


def _range(value: Mapping[str, float], sign: str = "") -> str:
    """An interval in percentage points; where all answers are alike there is none, since their spread is not known."""
    if value["low"] == value["high"]:
        return "all alike"
    return f"{100 * value['low']:{sign}.1f} to {100 * value['high']:{sign}.1f}"
