"""Data for self-distillation on the embedded task: python examples/self_distillation.py runs/self

The teacher's prompt holds a worked solution in front of the problem. The embedded students were never trained on such
contexts, so `reads.jsonl` first teaches one to use them (stage 1): behind a solution it calculates in the right order,
without one as before. In `train.jsonl` and `held-out.jsonl` the column `teacher_prompt` has the solution; the student's
prompt does not. Then: --config recipe:self-distillation.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from topd.embedded.task import STUDENTS, TEACHER, Problem, make_problems, write_solution

HABIT = STUDENTS["standard"]
"""How the student calculates: mostly from left to right, which is wrong."""
RIGHT = replace(HABIT, left_to_right=0.0)


def informed(problem: Problem, rng: random.Random) -> str:
    """A worked solution, then the problem."""
    return f"{write_solution(problem, TEACHER, rng)}.{problem.prompt}"


def write(rows: list[dict[str, str]], file: Path) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path, seed: int = 0, count: int = 4000) -> None:
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    reads = []
    for problem in make_problems(count, seed + 1, held_out=False):
        reads.append({"prompt": problem.prompt, "response": write_solution(problem, HABIT, rng)})
        reads.append({"prompt": informed(problem, rng), "response": write_solution(problem, RIGHT, rng)})
    write(reads, folder / "reads.jsonl")
    for name, held_out, size in (("train", False, count), ("held-out", True, 300)):
        problems = make_problems(size, seed, held_out=held_out)
        rows = [{"prompt": p.prompt, "answer": p.answer, "teacher_prompt": informed(p, rng)} for p in problems]
        write(rows, folder / f"{name}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
