"""`topd probe`: rollouts, windows and D_OT of any pair, batch by batch: an interruption loses one batch at most."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from topd.analysis.probe import ProbeOptions, measure, probe_records
from topd.analysis.probe_summary import GROUPS, Probe, token_table
from topd.near_future import Rollouts
from topd.near_future.sampling import local_pair, sample_rollouts, written_rollouts
from topd.paper import PROBE
from topd.resumable import earlier_records, write_options

RECORDS, OPTIONS, RESULT = "probe_records.jsonl", "probe_options.json", "probe.json"


@dataclass(frozen=True)
class ProbeRun:
    """What is probed.

    Attributes:
        student, teacher: names, for the record.
        rollouts: how many are measured, one a prompt; prompts are used again where there are fewer.
        batch: rollouts that are measured together.
        max_new_tokens, temperature: of the rollouts.
        given: the responses come with the prompts, and nothing is sampled.
        options: what is measured at them.
        chat_template_kwargs: for prompts that are messages.
    """

    student: str
    teacher: str
    data: str
    rollouts: int
    batch: int
    max_new_tokens: int
    temperature: float
    given: bool
    options: ProbeOptions
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


def run_probe(
    run: ProbeRun, student: Any, teacher: Any, tokenizer: Any, prompts: list[dict[str, Any]], out: Path
) -> dict[str, Any]:
    """Measure what is not measured yet, write `probe.json`, print the table; return what was written.

    Args:
        prompts: "prompt_ids", and "response_ids" where the rollouts are given.

    Raises:
        TOPDError: `out` holds a probe of something else.
    """
    console = Console()
    records = earlier_records(out / RECORDS, out / OPTIONS, asdict(run), limit=run.rollouts, batch=run.batch)
    write_options(out / OPTIONS, asdict(run))
    console.print(cost_message(run, len(records)))
    pair = local_pair(student, teacher, tokenizer, micro_batch=run.batch)
    with Progress(
        TextColumn("probing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=run.rollouts, completed=len(records))
        for first in range(len(records), run.rollouts, run.batch):
            rows = range(first, min(first + run.batch, run.rollouts))
            torch.manual_seed(run.options.seed * 1_000_003 + first)
            rollouts = _rollouts(run, student, tokenizer, [prompts[row % len(prompts)] for row in rows])
            scores, groups = measure(*pair, rollouts, run.options)
            fresh = probe_records(rollouts, scores, groups, tokenizer.decode, first)
            with (out / RECORDS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in fresh)
            records += fresh
            progress.update(task, completed=len(records))
    result = conclude(run, records)
    (out / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(probe_table(result))
    console.print(f"{out / RESULT} holds the figures, {out / RECORDS} every place with both windows.")
    console.print(f"To train with this threshold: --fork_threshold {result['threshold']:.4f}")
    return result


def conclude(run: ProbeRun, records: list[dict[str, Any]]) -> dict[str, Any]:
    """`probe.json`."""
    variants = {name: Probe.of_records(records, name).summary(seed=run.options.seed) for name in run.options.variants}
    main = run.options.variants[0]
    names = ("torch", "transformers", "POT", "lapx")
    return {
        "version": 1,
        **variants[main],
        "variant": main,
        "variants": variants,
        "tokens": token_table(records, main, variants[main]["threshold"]),
        "rollouts": len(records),
        "run": asdict(run),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def cost_message(run: ProbeRun, done: int) -> str:
    """Tokens that will be generated at most, before it starts."""
    left = run.rollouts - done
    places = len(GROUPS) * max(1, round(run.options.share * run.max_new_tokens))
    windows = 2 * left * places * max(run.options.window_lengths)
    already = f"{done} of {run.rollouts} rollouts are there already. " if done else ""
    what = (
        f"{left} given responses"
        if run.given
        else (f"{left} rollouts of up to {run.max_new_tokens} tokens ({left * run.max_new_tokens:,} at most)")
    )
    return (
        f"{already}{what}, then "
        f"about {places} places in each, where both models go on by {max(run.options.window_lengths)} tokens "
        f"({windows:,} at most)."
    )


def _rollouts(run: ProbeRun, student: Any, tokenizer: Any, prompts: list[dict[str, Any]]) -> Rollouts:
    ids: list[Tensor] = [torch.tensor(prompt["prompt_ids"]) for prompt in prompts]
    if run.given:
        responses = [torch.tensor(prompt["response_ids"]) for prompt in prompts]
        return written_rollouts(ids, responses, tokenizer, student.device)
    return sample_rollouts(student, tokenizer, ids, max_new_tokens=run.max_new_tokens, temperature=run.temperature)


def probe_table(result: dict[str, Any]) -> Table:
    """The main variant beside the paper's pair."""
    table = Table(title=f"Probe: {result['rollouts']} rollouts, {result['variant']}", title_justify="left")
    for name in ("", "value", "95 % interval", "paper's pair"):
        table.add_column(name, justify="left" if not name else "right")
    for group in GROUPS:
        row = result["groups"][group]
        table.add_row(
            f"median D_OT, {group}{'' if group == 'random' else '-loss'} (n = {row['n']})", f"{row['median']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}", f"{PROBE[group]:.3f}",
        )  # fmt: skip
    for name, words in (("pearson", "Pearson, loss and D_OT"), ("spearman", "Spearman, loss and D_OT")):
        row = result[name]
        table.add_row(words, f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{PROBE[name]:.3f}")
    row = result["false_alarm_share"]
    table.add_row(
        "false alarms among high-loss tokens", f"{row['value']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}",
        f"{PROBE['false_alarm_share']:.1%}",
    )  # fmt: skip
    table.add_row("the same for low-loss tokens, by construction", f"{result['low_loss_share']:.1%}", "", "75 %")
    return table
