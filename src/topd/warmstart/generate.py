"""`topd generate`: teacher solutions for prompts. Responses are saved as they are ready, then cleaned and written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from topd.errors import TOPDError
from topd.evaluation.engines import Engine, Request, Sampling
from topd.runs.console import progress
from topd.runs.files import append_records, write_json
from topd.runs.records import earlier_records
from topd.warmstart.solutions import clean, write_solutions


@dataclass(frozen=True)
class GenerateRun:
    """What to generate."""

    teacher: dict[str, Any]  # record of the model: name, fingerprint, engine, dtype
    data: str  # the source of the prompts, as given
    samples: int = 1  # responses per prompt
    filter: Any = None  # keep only right answers by this rule (see `evaluation.answers`); None keeps all
    sampling: Sampling = Sampling()


def run_generate(run: GenerateRun, teacher: Engine, prompts: Any, out: Path) -> None:
    """Respond to all prompts, resuming an interrupted run; then write `out` and its settings.

    `prompts`: rows with `prompt` and optionally `answer`; repeated prompts are dropped. `out`: .jsonl or .parquet;
    `.records.jsonl` (every response) and `.settings.json` are written next to it. Raises `TOPDError` if `out` was
    started with other settings or prompts, or no solution is left after cleaning.
    """
    console = Console()
    different: dict[str, dict[str, Any]] = {}
    for row in prompts:
        different.setdefault(json.dumps(row["prompt"]), row)
    rows = list(different.values())
    requests = [Request(i, rows[i // run.samples]["prompt"]) for i in range(len(rows) * run.samples)]
    records_file, settings_file = out.with_suffix(".records.jsonl"), out.with_suffix(".settings.json")
    settings = {
        **run.teacher, "data": run.data, "samples": run.samples, "responses": len(requests), **asdict(run.sampling),
    }  # fmt: skip
    needs = ("number", "prompt", "text", "truncated")
    records = earlier_records(records_file, settings_file, settings, needs=needs, may_change="responses")
    check_prompts(records, requests, out)
    write_json(settings, settings_file)
    done = {record["number"] for record in records}
    missing = [request for request in requests if request.number not in done]
    console.print(
        f"{len(rows)} prompts ({len(prompts) - len(rows)} repeated ones dropped) x {run.samples}: {len(requests)} "
        f"responses of up to {run.sampling.max_new_tokens} tokens; {len(requests) - len(missing)} are done."
    )
    if missing:
        teacher.check(missing, run.sampling)
    tokens = 0
    with progress(console, "responses", len(requests), len(requests) - len(missing)) as advance:
        for batch in teacher.respond(missing, run.sampling):
            fresh = [{"number": n, "prompt": requests[n].prompt, **asdict(response)} for n, response in batch]
            append_records(fresh, records_file)
            records += fresh
            tokens += sum(response.tokens for _, response in batch)
            advance(len(batch), f"{tokens} tokens")

    wanted = sorted((record for record in records if record["number"] < len(requests)), key=lambda r: r["number"])
    answers = [rows[record["number"] // run.samples].get("answer") for record in wanted]
    solutions, counts = clean(wanted, answers, run.filter)
    write_solutions(solutions, out)
    write_json(settings | {"filter": run.filter, "counts": counts}, settings_file)
    console.print(f"{out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()) + ".", markup=False)


def check_prompts(records: list[dict[str, Any]], requests: list[Request], out: Path) -> None:
    """Raise `TOPDError` if a record's prompt is not the one that now has its number: the data file has changed."""
    for record in records:
        if record["number"] < len(requests) and record["prompt"] != requests[record["number"]].prompt:
            raise TOPDError(
                f"The responses saved next to {out} are to other prompts (response {record['number']} is to "
                f"{str(record['prompt'])[:80]!r}). Give another --out, or the prompts in their original order."
            )
