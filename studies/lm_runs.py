"""What happens in the runs of studies/lm.yaml, for docs/results.md: python studies/lm_runs.py [STUDENT.samples.jsonl]

Prints, by study (48 steps, and the earlier ones with 24 and 16) and arm, means of the first and the last four steps.
Given the student's greedy answers to the first problems of `lm-held-out`, also each arm minus the student on these
problems, in points, with a 95 % interval over seeds and problems. docs/results.md has the command that writes such
answers. Last comes TOPD minus OPD over all pairs of runs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from topd.study.summary import crossed_interval

RESULTS = Path(__file__).parent / "results"
EARLIER = {f"{steps} steps": RESULTS / "earlier" / f"lm-{steps}-steps" / "runs" for steps in (24, 16)}
STUDIES = {"48 steps": RESULTS / "lm-runs" / "runs", **EARLIER}
METRICS = ("loss", "token_loss/mean", "false_alarm_share", "forks/per_rollout", "distance/q50", "guidance/grad_ratio")


def describe(title: str, runs: list[dict[str, Any]], student: np.ndarray | None) -> None:
    for name in METRICS:
        values = [list(run["metrics"][name].values()) for run in runs if name in run["metrics"]]
        if values:
            few = min(4, len(values[0]) // 2)
            first, last = (np.mean([each[part] for each in values]) for part in (slice(few), slice(-few, None)))
            print(f"{title}: {name} {first:.3g} to {last:.3g} ({len(values)} runs)")
    if student is not None:
        points = 100 * (np.array([run["right"]["greedy"][: len(student)] for run in runs]) - student)
        low, high = crossed_interval(points)
        print(f"{title}: minus the student {points.mean():+.1f} ({low:+.1f} to {high:+.1f}), greedy")


before = None
if sys.argv[1:]:
    lines = map(json.loads, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    before = np.array([line["right"] for line in sorted(lines, key=lambda line: line["problem"])], float)
for study, folder in STUDIES.items():
    for arm in sorted(folder.iterdir()):
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(arm.glob("*.json"))]
        describe(f"{study}, {arm.name}", found, before)

for how in ("greedy", "sampled"):
    pairs = []
    for opd in (file for study in STUDIES.values() for file in sorted((study / "opd").glob("*.json"))):
        topd = opd.parents[1] / "topd" / opd.name
        if topd.is_file():
            ours, theirs = (json.loads(file.read_text(encoding="utf-8"))["right"][how] for file in (topd, opd))
            pairs.append(100 * (np.array(ours, float) - theirs))
    low, high = crossed_interval(np.array(pairs))
    print(f"topd minus opd, {len(pairs)} pairs: {np.mean(pairs):+.1f} ({low:+.1f} to {high:+.1f}), {how}")
