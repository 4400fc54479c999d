"""Records of runs, made by hand, as training and the analyses write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</style><img src=x onerror=alert(3)>",
    "</details></title><!-- ",
    '" onmouseover="alert(4)" x="',
    "' autofocus onfocus='alert(5)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &#60;i&#62;",
    "🤖 émoji 😀‍🔥 \u202eright to left",
    "\x00\x1b[31m\r\ufffe",
    "\ud83d",
    "\n",
    " ",
    "",
]


def candidate(position: int = 1, *, distance: float | None = 0.4, fork: bool = True, **other: Any) -> dict[str, Any]:
    return {
        "position": position,
        "token": "5",
        "token_loss": 1.9,
        "distance": distance,
        "fork": fork,
        "decision": "guided" if fork else "none",
        "weight": 1.0,
        "student_window": ["5", "+", "2"],
        "teacher_window": ["2", "×", "5", "+"],
        "plan": [[0, 2, 0.33], [1, 3, 0.33], [2, 0, 0.25], [2, 1, 0.08]],
    } | other


def record(step: int = 10, *, candidates: list[dict[str, Any]] | None = None, **other: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "step": step,
        "method": "topd",
        "prompt": "what is 5+2×3?",
        "rollout": {"tokens": [" first ", "5", "+", "2"], "token_loss": [0.01, 1.9, 0.3, 5.5]},
        "candidates": [candidate()] if candidates is None else candidates,
    } | other


def metrics(step: int, *, near_future: bool) -> dict[str, float]:
    found = {
        "step": step, "loss": 0.3, "token_loss/mean": 0.3 / step, "token_loss/q50": 0.001, "token_loss/q90": 0.5,
        "token_loss/q99": 3.0, "seconds/rollout": 0.5, "seconds/scoring": 0.1, "seconds/loss": 0.1,
        "seconds/backward": 0.2, "completions/mean_length": 30.0,
    }  # fmt: skip
    if near_future:
        found |= {
            "distance/q25": 0.1, "distance/q50": 0.3, "distance/q75": 0.5, "false_alarm_share": 0.3,
            "guidance/own_token_share": 0.6, "guidance/loss": 2.0, "seconds/windows": 0.2, "seconds/transport": 0.05,
        }  # fmt: skip
    return found


def write_arm(folder: Path, records: list[Any], *, logged: int = 0, near_future: bool = True, **options: Any) -> Path:
    """A trainer output folder with so many logged steps. Without any, there are no curves to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    log = [metrics(step, near_future=near_future) for step in range(1, logged + 1)]
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": [*log, {"step": logged, "train_runtime": 9}]})
    )
    (folder / "topd_config.json").write_text(json.dumps({"method": folder.name, "window_length": 50} | options))
    if records:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
        (folder / "audit.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_results(folder: Path, **other: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    share = {"mean": 0.748, "low": 0.71, "high": 0.786, "n": 500}
    results = {
        "version": 1,
        "teacher": {"greedy": 0.992},
        "student": {"greedy": 0.552, "sampled": 0.418},
        "arms": [
            {"name": "opd", "greedy": share, "sampled": share, "seconds_per_step": 0.9, "steps": 5},
            {"name": "topd", "greedy": share | {"mean": 0.812}, "sampled": share, "seconds_per_step": 1.2, "steps": 5},
        ],
        "difference": {"greedy": {"mean": 0.064, "low": -0.028, "high": 0.1, "p": 0.0008}},
        "overhead": 1.31,
        "false_alarm_share": {"value": 0.304, "low": 0.262, "high": 0.347},
        "seconds_total": 412.3,
        "seed": 7,
        "versions": {"topd": "0.1.0", "torch": "2.9.1"},
    } | other
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_probe(
    folder: Path, *, rollouts: int = 6, places: int = 2, tokens: list[str] | None = None, readings: tuple[str, ...] = ()
) -> Path:
    """What `topd probe` writes: high-loss places alternate between fork and false alarm. `readings`: more of them."""
    folder.mkdir(parents=True, exist_ok=True)
    spoken = tokens or ["so", " 5", "+", "2"]
    names = ("student/cosine/50", *(f"{kind}/student/cosine/50" for kind in readings))
    for_group = {"high": 0.4, "random": 0.2, "low": 0.1}
    lines = []
    for number in range(rollouts):
        at = [
            {
                "group": group, "position": place % len(spoken), "token": spoken[place % len(spoken)],
                "token_loss": 1.0 + number + place, "teacher_nll": 9.0 + number - place,
                "distance": dict.fromkeys(
                    names, base + 0.01 * number - 0.35 * (group == "high" and place % 2 == 1)
                ),
                "student_window": spoken, "teacher_window": spoken[::-1], "plan": [[0, 1, 0.25], [1, 0, 0.25]],
            } | ({"begins_with_candidate": place % 2 == 0} if "regenerated" in readings else {})
            for group, base in for_group.items()
            for place in range(places)
        ]  # fmt: skip
        record = {"version": 1, "rollout": number, "prompt": "?", "tokens": spoken, "token_loss": [0.1] * len(spoken)}
        lines.append(json.dumps(record | {"places": at}))
    (folder / "probe_records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    interval = {"value": 0.25, "low": 0.2, "high": 0.3}
    result = {
        "version": 1, "variant": "student/cosine/50", "threshold": 0.15, "rollouts": rollouts,
        "groups": {g: {"median": v, "low": v - 0.1, "high": v + 0.1, "q1": v, "q3": v, "n": 12}
                   for g, v in for_group.items()},
        "pearson": interval, "spearman": interval, "false_alarm_share": interval, "low_loss_share": 0.75,
        "tokens": [{"token": spoken[0], "n": 8, "false_alarms": 6, "forks": 2}],
        "run": {"student": "small", "teacher": "big"},
    }  # fmt: skip
    result["variants"] = {name: dict(result) for name in ("student/cosine/50", "teacher/cosine/50")}
    if readings:
        share = {"value": 0.625, "low": 0.5, "high": 0.75}
        for row in result["groups"].values():
            row |= {"near_zero": share} | ({"begins_with_candidate": share} if "regenerated" in readings else {})
        result["readings"] = {"rollout": "student/cosine/50"} | {kind: f"{kind}/student/cosine/50" for kind in readings}
        result["variants"] = {name: dict(result) for name in result["readings"].values()}
        result["pearson_nll"] = result["spearman_nll"] = interval | {"value": 0.71}
    (folder / "probe.json").write_text(json.dumps(result))
    return folder


def write_correct(folder: Path, *, forks: int = 3, tokens: list[str] | None = None) -> Path:
    """What `topd correct` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    spoken = tokens or ["2", "+", "5"]

    def told(distance: float, window: list[str]) -> dict[str, Any]:
        return {"distance": distance, "teacher_log_likelihood": -1.0, "agreement": 0.5, "right": True, "window": window}

    lines = [
        json.dumps({
            "version": 1, "rollout": fork, "position": 3, "token_loss": 2.0, "prefix": "what is 5+2?",
            "teacher_window": spoken, "before": told(0.5, spoken[::-1]),
            "after": {"opd": told(0.4, spoken[:1] + spoken[::-1]), "topd": told(0.2 + 0.1 * fork, spoken)},
        })
        for fork in range(forks)
    ]  # fmt: skip
    (folder / "correct_records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    row = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": forks, "q1": 0.4, "median": 0.5, "q3": 0.6}
    measure = {
        "arms": {"before": row, "opd": row | {"mean": 0.4}, "topd": row | {"mean": 0.3}},
        "beside_opd": {"topd": {"mean": -0.1, "low": -0.2, "high": 0.0, "p": 0.04, "n": forks}},
    }
    result = {"version": 1, "forks": forks, "measures": {"distance": measure, "agreement": measure},
              "run": {"options": {"steps": 5}}}  # fmt: skip
    (folder / "correct.json").write_text(json.dumps(result))
    return folder


def write_study(folder: Path, names: list[str], *, seeds: int = 2, points: int = 4, **other: Any) -> Path:
    """What `topd study` writes: OPD and arms that differ from it more and more, tuned over two learning rates."""
    folder.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Any] = {}
    for place, name in enumerate(["opd", *names]):
        mean = 0.5 - 0.02 * place
        interval = {"mean": mean, "low": mean - 0.03, "high": mean + 0.03}
        beside = {"mean": mean - 0.5, "low": mean - 0.53, "high": mean - 0.48, "p": 0.02, "p_holm": 0.04,
                  "seeds": list(range(seeds)), "ahead": 1}  # fmt: skip
        found = {"seeds": list(range(seeds)), "accuracy": interval} | ({"beside_opd": beside} if place else {})
        arms[name] = {
            "greedy": found,
            "sampled": found,
            "right": {str(seed): {"greedy": "0110", "sampled": "1100"} for seed in range(seeds)},
            "curve": {
                str(seed): [
                    {"step": 6 * n, "tokens": 90_000 * n, "seconds": (2.0 + place) * n,
                     "accuracy": 0.3 + (mean - 0.3) * n / (points - 1) + 0.02 * seed}
                    for n in range(points)
                ]
                for seed in range(seeds)
            },
            "seconds_training": {str(seed): 20.0 + 10 * place + seed for seed in range(seeds)},
            "steps": dict.fromkeys(map(str, range(seeds)), 30),
        }  # fmt: skip
    rates = [{"learning_rate": 0.0001, "guidance_weight": 0.1}, {"learning_rate": 0.0003, "guidance_weight": 0.1}]
    tuning = {name: [{"choice": choice, "accuracy": 0.4 + 0.1 * n} for n, choice in enumerate(rates)] for name in arms}
    plan = {"student": "small", "teacher": "big", "steps": 30, "held_out": 1000}
    result = {"version": 2, "plan": plan, "tuning": tuning, "tuned": dict.fromkeys(arms, rates[1]), "arms": arms}
    (folder / "study.json").write_text(json.dumps(result | other))
    return folder
