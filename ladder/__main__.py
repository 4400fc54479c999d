"""`python -m ladder`: make a level's pair and data. `python -m ladder --level small` runs on two CPU cores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ladder.levels import LEVELS
from topd.runs.files import write_json


def main(arguments: list[str] | None = None) -> int:
    """0 when made; 2 without reasoning-gym."""
    parser = argparse.ArgumentParser(prog="python -m ladder", description=__doc__)
    parser.add_argument("--level", choices=LEVELS, default="small")
    parser.add_argument("--out", type=Path, help="default: runs/ladder/LEVEL")
    parser.add_argument(
        "--only", choices=("data", "teacher", "student"), help="make this alone, as to train both at once"
    )
    options = parser.parse_args(arguments)
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        print(
            "The ladder's problems are reasoning-gym's: pip install -c constraints.txt -e '.[ladder]'", file=sys.stderr
        )
        return 2
    from ladder.build import build_tokenizer, train, write_data

    level, out = LEVELS[options.level], options.out or Path("runs/ladder") / options.level
    if options.only in (None, "data"):
        write_data(level, out)
    for name in ("teacher", "student"):
        if options.only in (None, name):
            record = train(name, level, build_tokenizer(level), out)
            write_json(record | {"tasks": level.tasks}, out / name / "build.json")
    parts = ("prompts.jsonl", "teacher/build.json", "student/build.json")
    missing = [part.split("/")[0] for part in parts if not (out / part).is_file()]
    print(
        f"Not there yet in {out}: {', '.join(missing)}."
        if missing
        else f"{out} is ready: topd study --config studies/ladder-{options.level}.yaml"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
