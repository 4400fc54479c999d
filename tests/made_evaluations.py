"""Folders of evaluations, made by hand, as `topd eval` leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_evaluation(folder: Path, benchmark: str, right: Any, **settings: Any) -> Path:
    """One model on one benchmark: [problem, sample] right or wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = [{"id": f"{n:04d}", "answer": "7"} for n in range(len(right))]
    told = {"model": str(folder), "rule": "math", "temperature": 0.6, "problems": problems, "versions": {}} | settings
    (folder / f"{benchmark}.settings.json").write_text(json.dumps(told))
    lines = [
        {
            "problem": problem["id"], "sample": sample, "text": r"\boxed{7}", "extracted": "7" if is_right else "8",
            "right": bool(is_right), "parsed": True, "truncated": False, "tokens": 10,
        }
        for problem, row in zip(problems, right, strict=True)
        for sample, is_right in enumerate(row)
    ]  # fmt: skip
    (folder / f"{benchmark}.samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
