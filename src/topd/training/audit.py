"""Audit records: what the method decided, on which tokens, as JSON lines that the report reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.near_future import Rollouts
from topd.runs.files import write_json
from topd.training.config import TOPDConfig
from topd.training.futures import NearFuture

RECORD_VERSION = 1


def audit_records(
    rollouts: Rollouts,
    future: NearFuture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    method: str,
    limit: int,
) -> list[dict[str, Any]]:
    """One record per rollout: prompt, tokens with their loss (nats), and every candidate with both windows."""

    def texts(ids: Tensor) -> list[str]:
        return [str(tokenizer.decode([token])) for token in ids.tolist()]

    records, look, found = [], future.look, future.candidates
    for row in range(min(limit, len(rollouts))):
        mask = rollouts.response_mask[row].bool()
        tokens, losses = texts(rollouts.response_ids[row][mask]), look.token_loss[row][mask]
        candidates = []
        for index in (found.places.rows == row).nonzero().squeeze(-1).tolist():
            position = int(found.places.positions[index])
            ours, theirs = int(found.ours.mask[index].sum()), int(found.theirs.mask[index].sum())  # padding left out
            plan, distance = found.transport.plan[index], float(found.distance[index])
            candidates.append({
                "position": position,
                "token": tokens[position],
                "token_loss": _number(look.token_loss[row, position]),
                "distance": _number(distance) if bool(found.transport.converged[index]) else None,
                "threshold": _number(future.threshold),
                "fork": bool(future.fork[index]),
                "decision": "guided" if future.guided[index] else "capped" if future.capped[index] else "none",
                "weight": _number(future.weights[row, position]),
                "student_window": texts(found.ours.tokens[index][found.ours.mask[index]]),
                "teacher_window": texts(found.theirs.tokens[index][found.theirs.mask[index]]),
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


def _number(value: Tensor | float) -> float:
    return round(float(value), 6)


def save_options(args: TOPDConfig) -> None:
    """Write the method's options to `topd_config.json` in the output folder, for the report."""
    names = set(asdict(args)) & set(TOPDConfig.__annotations__) | {"learning_rate", "seed", "max_completion_length"}
    folder = Path(str(args.output_dir))
    options = {name: getattr(args, name) for name in sorted(names)}
    write_json(options, folder / "topd_config.json")
