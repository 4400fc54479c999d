"""What several commands take: kinds of arguments, prompts by name, how a run was started and where it resumes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.embedded.pair import PREFIX
from topd.errors import TOPDError

if TYPE_CHECKING:
    from topd.runs.recorded import Started

EMBEDDED_PROMPTS = 4096
"""Prompts drawn from the embedded task where `data_limit` does not say."""

MOST_EMBEDDED = 100_000
"""There are some millions of problems; drawing most of them without repeats would take long."""


def json_object(text: str) -> dict[str, Any]:
    """Of an argument such as '{"enable_thinking": false}'."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"write a JSON object, not {text[:60]!r}")
    return value


def data_source(given: str | None, *models: str) -> str:
    """Where the prompts come from. If nothing is given, embedded models have the embedded task, others have nothing."""
    embedded = [model.removeprefix(PREFIX) for model in models if model.startswith(PREFIX)]
    if given is None and not embedded:
        raise TOPDError(
            f"Name the prompts for {models[0]}: --data FILE.jsonl (or .json, .csv, .parquet, a Hub dataset; --data "
            "embedded is the embedded task)."
        )
    return given or ("embedded-long" if any(name.startswith("long") for name in embedded) else "embedded")


def prompts(source: str, split: str, limit: int | None, responses: bool = False, also: Any = None) -> Any:
    """A dataset of prompts (and answers, given responses, columns as `also` reads them), or the embedded task's."""
    from topd.embedded.task import DATA

    if responses and source in DATA:
        raise TOPDError("The embedded task has no given responses. Name a file that has: --data FILE.jsonl.")
    if source in DATA:
        from datasets import Dataset

        from topd.embedded.task import make_problems

        if limit is not None and not 0 < limit <= MOST_EMBEDDED:
            raise TOPDError(f"data_limit is {limit}; the embedded task gives 1 to {MOST_EMBEDDED:,} prompts.")
        if also:
            raise TOPDError(
                f"The embedded task has no column {', '.join(also)}. Name a file that has: --data FILE.jsonl."
            )
        problems = make_problems(limit or EMBEDDED_PROMPTS, seed=0, held_out=False, level=DATA[source])
        return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])
    from topd.loading.data import load_prompts

    return load_prompts(source, split=split, limit=limit, responses=responses, also=also)


def started(words: Sequence[str], *parts: Any) -> Started:
    """How a command was started: every option, before anything is filled in, and the words as they were typed."""
    from topd.runs.provenance import changed_options, command_line, options_of
    from topd.runs.recorded import Started

    options = options_of(*parts)
    return Started(options, changed_options(options, *parts), command_line(("topd", *words)))


def resume_from(config: Any) -> str | bool | None:
    """Where to go on: the checkpoint that is named, or True for the newest whole one, if there is one at first sight.

    With `auto` too, if there is one. Checksums are compared later, by the trainer.

    Raises:
        ResumeError: there is none; or the folder holds checkpoints and the option is not given, since the new run's
            would be mixed with them.
    """
    from topd.runs.checkpoints import checkpoint_to_resume, newest_whole
    from topd.runs.output_folder import AUTO, refuse_second_run

    wanted, folder = str(config.resume_from_checkpoint or "false"), Path(config.output_dir)
    if wanted.lower() == "false":
        refuse_second_run(folder)
        return None
    if wanted.lower() == AUTO and newest_whole(folder)[0] is None:
        return None
    newest = wanted.lower() in ("true", AUTO)
    checkpoint, _ = checkpoint_to_resume(newest or wanted, folder, thorough=False)
    return newest or str(checkpoint)
