"""Audit records: what the method decided, on which tokens, as JSON lines that the report reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.files import write_json, write_text
from topd.near_future import Rollouts
from topd.training.config import TOPDConfig
from topd.training.futures import NearFuture

RECORD_VERSION = 1
AUDIT_FILE = "audit.jsonl"


def audit_records(
    rollouts: Rollouts,
    future: NearFuture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    method: str,
    limit: int,
) -> list[dict[str, Any]]:
    """One record a rollout: prompt, tokens with their loss (nats), and every candidate with both windows."""

    def texts(ids: Tensor) -> list[str]:
        return [str(tokenizer.decode([token])) for token in ids.tolist()]

    records = []
    for row in range(min(limit, len(rollouts))):
        mask = rollouts.response_mask[row].bool()
        tokens, losses = texts(rollouts.response_ids[row][mask]), future.token_loss[row][mask]
        candidates = []
        for index in (future.rows == row).nonzero().squeeze(-1).tolist():
            position = int(future.positions[index])
            ours, theirs = int(future.ours.mask[index].sum()), int(future.theirs.mask[index].sum())  # padding left out
            plan, distance = future.transport.plan[index], float(future.transport.distance[index])
            candidates.append({
                "position": position,
                "token": tokens[position],
                "token_loss": _number(future.token_loss[row, position]),
                "distance": _number(distance) if bool(future.transport.converged[index]) else None,
                "threshold": _number(future.threshold),
                "fork": bool(future.fork[index]),
                "decision": "guided" if future.guided[index] else "capped" if future.capped[index] else "none",
                "weight": _number(future.weights[row, position]),
                "student_window": texts(future.ours.tokens[index][future.ours.mask[index]]),
                "teacher_window": texts(future.theirs.tokens[index][future.theirs.mask[index]]),
                "plan": [[i, j, _number(plan[i, j])] for i, j in plan.nonzero().tolist() if i < ours and j < theirs],
            })  # fmt: skip
        records.append(
            {
                "version": RECORD_VERSION,
                "step": step,
                "method": method,
                "prompt": tokenizer.decode(rollouts.prefix(row, 0)),
                "rollout": {"tokens": tokens, "token_loss": [_number(loss) for loss in losses]},
                "candidates": candidates,
            }
        )
    return records


def cut_records(path: Path, step: int) -> None:
    """Keep the records up to an optimizer step, from which the run goes on: later ones are made again.

    At step 0 they all belong to an earlier run, and are kept in `audit.earlier.jsonl`.
    """
    if not path.is_file():
        return
    if step == 0:
        path.replace(path.with_name("audit.earlier.jsonl"))
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines would part texts at U+2028
    kept = [line for line in lines if _up_to(line, step)]
    write_text("".join(line + "\n" for line in kept), path)


def _up_to(line: str, step: int) -> bool:
    """Whether it is a record of such a step; the last line may have been cut off."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _number(value: Tensor | float) -> float:
    return round(float(value), 6)


def save_options(args: TOPDConfig) -> None:
    """Write the method's options to `topd_config.json` in the output folder, for the report."""
    names = set(asdict(args)) & set(TOPDConfig.__annotations__) | {"learning_rate", "seed", "max_completion_length"}
    folder = Path(str(args.output_dir))
    options = {name: getattr(args, name) for name in sorted(names)}
    write_json(options, folder / "topd_config.json")
