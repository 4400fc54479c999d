"""Studies of a few steps and problems."""

from __future__ import annotations

import json

from topd.study.config import plan_of


def plan(**other):
    found = {
        "student": "embedded:student-standard", "teacher": "embedded:teacher", "seeds": [0, 1], "steps": 4,
        "held_out": 6, "curve_every": 1, "curve_problems": 4, "tune_problems": 5,
        "options": {"per_device_train_batch_size": 2, "max_completion_length": 12, "window_length": 4},
        "arms": {"opd": {"method": "opd"}, "topd": {"method": "topd"}},
    }  # fmt: skip
    return plan_of(found | other)


def files_of(task, folder):
    """The embedded task's problems, as a user's files."""
    asked = {
        "train": task.prompts(8, seed=3),
        "held_out": [{"prompt": problem.prompt, "answer": problem.answer} for problem in task.held_out()],
        "tuning": [{"prompt": problem.prompt, "answer": problem.answer} for problem in task.tuning()],
    }
    for name, rows in asked.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": str(folder / "train.jsonl"),
        "benchmark": f"embedded={folder / 'held_out.jsonl'}",
        "tune_benchmark": f"embedded={folder / 'tuning.jsonl'}",
    }
