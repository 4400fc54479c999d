"""A NaN or infinity stops the run before the optimizer moves, and says where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from topd.errors import NonFiniteError
from topd.near_future import Rollouts
from topd.training.checkpoints import newest_whole


def non_finite_error(
    what: str, step: int, output_dir: str, rollouts: Rollouts | None, row_loss: torch.Tensor | None, decode: Any
) -> NonFiniteError:
    """Name the step and the rollouts at fault, write them to `non_finite.json`, and return the error to raise.

    Args:
        what: "loss", "gradient of layer X", ...
        row_loss: [rollout] mean token loss (nats); the rows that are not finite are at fault, else the largest.
        decode: token ids to text.
    """
    newest, _ = newest_whole(Path(output_dir))
    kept = f"the last whole checkpoint is {newest}" if newest else "no checkpoint was saved yet"
    lines = [f"The {what} is not finite at step {step}. The optimizer has not moved; {kept}."]
    if rollouts is not None and row_loss is not None:
        bad = (~row_loss.isfinite()).nonzero().squeeze(-1).tolist() or [int(row_loss.argmax())]
        records = [
            {
                "step": step,
                "rollout": row,
                "token_loss_nats": float(row_loss[row]),
                "prompt": decode(rollouts.prefix(row, 0)),
                "response": decode(rollouts.response_ids[row][rollouts.response_mask[row].bool()]),
            }
            for row in bad
        ]
        where = Path(output_dir) / "non_finite.json"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(json.dumps(records, indent=1, ensure_ascii=False, allow_nan=True) + "\n")
        first = records[0]
        lines.append(f"Rollout {first['rollout']} of the batch, prompt {str(first['prompt'])[:120]!r}; all in {where}.")
    lines.append(
        f"{'Resume from it' if newest else 'Start again'} with a lower learning_rate or a smaller guidance_weight; if "
        "it comes back on the same rollout, look for -inf or NaN in the models' logits there (half precision, masked "
        "vocabulary)."
    )
    return NonFiniteError(" ".join(lines))


@contextmanager
def naming_nan_in_sampling(step: int, output_dir: str) -> Iterator[None]:
    """`generate` refuses to sample from NaN probabilities with a bare RuntimeError: say what it means."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        what = "student's next-token distribution while sampling rollouts"
        raise non_finite_error(what, step, output_dir, None, None, None) from error


class StopOnNonFiniteGradient(TrainerCallback):
    """Looks at every gradient before the optimizer steps (not with fp16, whose scaler skips such steps itself)."""

    def __init__(self, raise_error: Any) -> None:
        self.raise_error = raise_error

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:
            return
        gradients = {n: p.grad for n, p in kwargs["model"].named_parameters() if p.grad is not None}
        sums = [gradient.sum() for gradient in gradients.values()]  # not finite where any entry is not
        if not sums or _all_finite(sums):
            return
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):  # a sum of finite entries may overflow
                self.raise_error(f"gradient of {name}")


def _all_finite(values: list[torch.Tensor]) -> bool:
    """One look at the device for all of them."""
    return bool(torch.stack([value.double().to(values[0].device) for value in values]).isfinite().all())
