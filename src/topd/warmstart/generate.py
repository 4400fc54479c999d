"""`topd generate`: teacher solutions for prompts, kept as they come, then cleaned and written in one piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from topd.errors import TOPDError
from topd.evaluation.responses import Engine, Request, Sampling
from topd.runs.files import append_records
from topd.runs.resumable import earlier_records, write_options
from topd.warmstart.solutions import clean, write_solutions


@dataclass(frozen=True)
class GenerateRun:
    """What is generated.

    Attributes:
        teacher: what responds: name, fingerprint, engine, dtype.
        data: as named by the user.
        samples: responses to each prompt.
        filter: the rule of a right answer (see `evaluation.answers`), or None to keep them all.
    """

    teacher: dict[str, Any]
    data: str
    samples: int = 1
    filter: Any = None
    sampling: Sampling = Sampling()


def run_generate(run: GenerateRun, teacher: Engine, prompts: Any, out: Path, console: Console | None = None) -> None:
    """Respond to all prompts, going on where an interrupted run stopped; then write `out` and its settings.

    Args:
        prompts: rows with `prompt` and maybe `answer`; the first of equal prompts counts.
        out: .jsonl or .parquet. Beside it: `.records.jsonl`, every response, and `.settings.json`.

    Raises:
        TOPDError: `out` was begun with other settings or other prompts, or no solution is left after cleaning.
    """
    console = console or Console()
    rows = different(prompts)
    requests = [Request(i, rows[i // run.samples]["prompt"]) for i in range(len(rows) * run.samples)]
    records_file, settings_file = out.with_suffix(".records.jsonl"), out.with_suffix(".settings.json")
    settings = {
        **run.teacher, "data": run.data, "samples": run.samples, "responses": len(requests), **asdict(run.sampling),
    }  # fmt: skip
    needs = ("number", "prompt", "text", "truncated")
    records = earlier_records(records_file, settings_file, settings, needs=needs, may_change="responses")
    check_prompts(records, requests, out)
    write_options(settings_file, settings)
    done = {record["number"] for record in records}
    missing = [request for request in requests if request.number not in done]
    console.print(
        f"{len(rows)} prompts ({len(prompts) - len(rows)} repeated ones left out) x {run.samples}: {len(requests)} "
        f"responses of up to {run.sampling.max_new_tokens} tokens; {len(requests) - len(missing)} are there."
    )
    if missing:
        teacher.check(missing, run.sampling)
    for batch in progress(teacher, missing, len(requests), run.sampling, console):
        append_records(batch, records_file)
        records += batch

    wanted = sorted((record for record in records if record["number"] < len(requests)), key=lambda r: r["number"])
    answers = [rows[record["number"] // run.samples].get("answer") for record in wanted]
    solutions, counts = clean(wanted, answers, run.filter)
    write_solutions(solutions, out)
    write_options(settings_file, settings | {"filter": run.filter, "counts": counts})
    console.print(f"{out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()) + ".")


def progress(
    teacher: Engine, missing: list[Request], total: int, sampling: Sampling, console: Console
) -> Iterator[list[dict[str, Any]]]:
    """Records as they come, with a bar."""
    prompt = {request.number: request.prompt for request in missing}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[tokens]} tokens"), console=console,
    ) as bar:  # fmt: skip
        task, tokens = bar.add_task("responses", total=total, completed=total - len(missing), tokens=0), 0
        for batch in teacher.respond(missing, sampling):
            yield [{"number": n, "prompt": prompt[n], **asdict(response)} for n, response in batch]
            tokens += sum(response.tokens for _, response in batch)
            bar.update(task, advance=len(batch), tokens=tokens)


def different(prompts: Any) -> list[dict[str, Any]]:
    """Rows with different prompts; the first of equal ones."""
    first: dict[str, dict[str, Any]] = {}
    for row in prompts:
        first.setdefault(json.dumps(row["prompt"]), row)
    return list(first.values())


def check_prompts(records: list[dict[str, Any]], requests: list[Request], out: Path) -> None:
    """Raise `TOPDError` where a record is not of the prompt that now has its number: the data file was changed."""
    for record in records:
        if record["number"] < len(requests) and record["prompt"] != requests[record["number"]].prompt:
            raise TOPDError(
                f"The responses beside {out} are to other prompts (response {record['number']} is to "
                f"{str(record['prompt'])[:80]!r}). Give another --out, or the prompts in their former order."
            )
