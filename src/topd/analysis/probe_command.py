"""`topd probe`: rollouts, windows and D_OT of any pair, batch by batch. An interruption loses at most one batch."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from topd.analysis.probe import ProbeOptions, measure, probe_records
from topd.analysis.probe_summary import probe_of, summary, token_table
from topd.evaluation.tables import open_table
from topd.near_future import Rollouts
from topd.near_future.sampling import local_pair, sample_rollouts, written_rollouts
from topd.paper import CORRELATIONS, GROUPS, NEAR_ZERO, NEAR_ZERO_SHARES, PROBE
from topd.runs.console import progress
from topd.runs.files import append_records, write_json
from topd.runs.records import Records, earlier_records

RECORDS, OPTIONS, RESULT = "probe_records.jsonl", "probe_options.json", "probe.json"


@dataclass(frozen=True)
class ProbeRun:
    """The settings of a probe, for the record."""

    student: str
    teacher: str
    data: str
    rollouts: int  # one per prompt; prompts repeat if there are fewer
    batch: int  # rollouts to sample and measure together
    max_new_tokens: int  # of the rollouts
    temperature: float  # of the rollouts
    given: bool  # use the responses of the data instead of sampling
    options: ProbeOptions
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # for prompts that are messages
    weights: dict[str, str | None] = field(default_factory=dict)  # digest of each model: a folder may hold others later


def run_probe(
    run: ProbeRun, student: Any, teacher: Any, tokenizer: Any, prompts: list[dict[str, Any]], out: Path
) -> dict[str, Any]:
    """Measure the remaining rollouts, write `probe.json` and print the table. Returns the content of `probe.json`.

    `prompts`: "prompt_ids", and "response_ids" if the rollouts are given. Raises `TOPDError` if `out` holds records of
    a probe with other settings; those of other prompts or given responses are made again.
    """
    console, decode = Console(), tokenizer.decode

    def as_now(record: dict[str, Any]) -> bool:
        row = prompts[record["rollout"] % len(prompts)]
        given = [decode([token]) for token in row["response_ids"]] if run.given else record["tokens"]
        return (record["prompt"], record["tokens"]) == (decode(row["prompt_ids"]), given)

    records = earlier_records(
        out / RECORDS, out / OPTIONS, asdict(run), needs=("rollout", "prompt", "tokens", "token_loss", "places"),
        keep=lambda found: whole_batches([each for each in found if as_now(each)], run.batch, run.rollouts),
    )  # fmt: skip
    done = {record["rollout"] for record in records}
    write_json(asdict(run), out / OPTIONS)
    console.print(cost_message(run, len(records)))
    pair = local_pair(student, teacher, tokenizer, micro_batch=run.batch)
    with progress(console, "probing", run.rollouts, len(records)) as advance:
        for first in range(0, run.rollouts, run.batch):
            if first in done:
                continue
            rows = range(first, min(first + run.batch, run.rollouts))
            seed = run.options.seed * 1_000_003 + first
            torch.manual_seed(seed)
            rollouts = _rollouts(run, student, tokenizer, [prompts[row % len(prompts)] for row in rows])
            scores, groups = measure(*pair, rollouts, replace(run.options, seed=seed))
            fresh = probe_records(rollouts, scores, groups, decode, first)
            append_records(fresh, out / RECORDS)
            records += fresh
            advance(len(fresh))
    result = conclude(run, sorted(records, key=lambda record: record["rollout"]))
    write_json(result, out / RESULT)
    console.print(probe_table(result))
    if len(result["readings"]) > 1:
        Console(width=max(console.width, 118)).print(fingerprint_table(result))
    console.print(f"Summary: {out / RESULT}. All places with both windows: {out / RECORDS}.", markup=False)
    window = run.options.student_windows[0]
    console.print(f"To train with this threshold: --student_window {window} --fork_threshold {result['threshold']:.4f}")
    return result


def whole_batches(records: Records, batch: int, rollouts: int) -> Records:
    """The records of complete batches. The rollouts of a batch are sampled and measured together."""
    found = {record["rollout"]: record for record in records}
    batches = [range(first, min(first + batch, rollouts)) for first in range(0, rollouts, batch)]
    return [found[row] for rows in batches if all(row in found for row in rows) for row in rows]


def conclude(run: ProbeRun, records: list[dict[str, Any]]) -> dict[str, Any]:
    """`probe.json`: the statistics of the main variant and of all variants, and the variant of each reading."""
    variants = {name: summary(probe_of(records, name), seed=run.options.seed) for name in run.options.variants}
    main = run.options.main
    # for each reading of the student's window, the variant that equals the main one otherwise
    readings = {window: f"{window}/{main.partition('/')[2]}" for window in run.options.student_windows}
    versions = {name: version(name) for name in ("torch", "transformers", "POT", "lapx")}
    return {
        "version": 1, **variants[main], "variant": main, "variants": variants, "readings": readings,
        "tokens": token_table(records, main, variants[main]["threshold"]), "rollouts": len(records),
        "run": asdict(run), "versions": {"python": platform.python_version()} | versions,
    }  # fmt: skip


def cost_message(run: ProbeRun, done: int) -> str:
    """The maximum number of tokens to generate."""
    left = run.rollouts - done
    places = len(GROUPS) * max(1, round(run.options.share * run.max_new_tokens))
    models = 1 + sum(kind != "rollout" for kind in run.options.student_windows)  # the rollout has its own window
    length = max(run.options.window_lengths)
    resumed = f"{done} of {run.rollouts} rollouts are done. " if done else ""
    sampled = f"rollouts of up to {run.max_new_tokens} tokens ({left * run.max_new_tokens:,} at most)"
    return (
        f"{resumed}To measure: {left} {'given responses' if run.given else sampled}, about {places} places in each, "
        f"with windows of {length} tokens ({models * left * places * length:,} tokens at most)."
    )


def _rollouts(run: ProbeRun, student: Any, tokenizer: Any, prompts: list[dict[str, Any]]) -> Rollouts:
    ids = [torch.tensor(prompt["prompt_ids"]) for prompt in prompts]
    if run.given:
        responses = [torch.tensor(prompt["response_ids"]) for prompt in prompts]
        return written_rollouts(ids, responses, tokenizer, student.device)
    return sample_rollouts(student, tokenizer, ids, max_new_tokens=run.max_new_tokens, temperature=run.temperature)


def probe_table(result: dict[str, Any]) -> Table:
    """The main variant, next to the paper's pair."""
    table = Table(title=f"Probe: {result['rollouts']} rollouts, {result['variant']}", title_justify="left")
    for name in ("", "value", "95 % interval", "paper's pair"):
        table.add_column(name, justify="left" if not name else "right")
    for group in GROUPS:
        row = result["groups"][group]
        table.add_row(
            f"median D_OT, {GROUPS[group]} (n = {row['n']})", f"{row['median']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}", f"{PROBE[group]:.3f}",
        )  # fmt: skip

    def add(words: str, entry: dict[str, float], paper: float, form: str) -> None:
        table.add_row(words, f"{entry['value']:{form}}", _interval(entry, form), f"{paper:{form}}")

    for group, words in GROUPS.items():
        add(f"D_OT < {NEAR_ZERO}, {words}", result["groups"][group]["near_zero"], NEAR_ZERO_SHARES[group], ".1%")
    for name, words in CORRELATIONS.items():
        add(words, result[name], PROBE[name.removesuffix("_nll")], ".3f")
    add("false alarms among high-loss tokens", result["false_alarm_share"], PROBE["false_alarm_share"], ".1%")
    table.add_row("same for low-loss, by construction", f"{result['low_loss_share']:.1%}", "", "75 %")
    return table


def fingerprint_table(result: dict[str, Any]) -> Table:
    """All readings of the student's window at the same places, with 95 % intervals, next to the paper's Fig. 2a."""
    readings = {kind: result["variants"][name] for kind, name in result["readings"].items()}
    title = "The student's window in each reading, at the same places (95 % intervals)"
    table = open_table(["", *readings, "paper"], title)

    def add(words: str, entries: list[dict[str, float]], paper: float | None, percent: bool = True) -> None:
        scale, form = (100, ".1f") if percent else (1, ".3f")
        scaled = [{name: scale * value for name, value in entry.items()} for entry in entries]
        values = [f"{each['value']:{form}} ({_interval(each, form)})" if each else "" for each in scaled]
        table.add_row(words, *values, "" if paper is None else f"{scale * paper:{form}}")

    for group, words in GROUPS.items():
        share = [found["groups"][group]["near_zero"] for found in readings.values()]
        add(f"D_OT < {NEAR_ZERO}, {words}, %", share, NEAR_ZERO_SHARES[group])
    for group, words in GROUPS.items():
        rows = [found["groups"][group] for found in readings.values()]
        medians = [{"value": row["median"], "low": row["low"], "high": row["high"]} for row in rows]
        add(f"median D_OT, {words}", medians, PROBE[group], percent=False)
    add("false alarms, %", [found["false_alarm_share"] for found in readings.values()], PROBE["false_alarm_share"])
    if "regenerated" in readings:
        for group, words in GROUPS.items():
            begins = [found["groups"][group].get("begins_with_candidate", {}) for found in readings.values()]
            add(f"begins with candidate, {words}, %", begins, None)
    return table


def _interval(entry: dict[str, float], form: str) -> str:
    return f"{entry['low']:{form}} to {entry['high']:{form}}"
