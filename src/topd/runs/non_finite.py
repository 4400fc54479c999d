"""A NaN or infinity stops the run before the optimizer steps, with a message that says where it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from topd.errors import NonFiniteError
from topd.near_future import Rollouts
from topd.runs.checkpoints import newest_whole
from topd.runs.files import write_json


def non_finite_error(
    what: str, step: int, output_dir: str, rollouts: Rollouts | None, row_loss: torch.Tensor | None, decode: Any
) -> NonFiniteError:
    """The error to raise: it names `what`, the step, and the rollouts at fault, which are written to `non_finite.json`.

    `row_loss`: [rollout] mean token loss (nats). Rows that are not finite are at fault, or else the largest. `decode`:
    token ids to text.
    """
    newest, _ = newest_whole(Path(output_dir))
    kept = f"the last complete checkpoint is {newest}" if newest else "no checkpoint was saved yet"
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
        file = Path(output_dir) / "non_finite.json"
        write_json(records, file)
        first = records[0]
        lines.append(f"Rollout {first['rollout']} of the batch, prompt {str(first['prompt'])[:120]!r}; all in {file}.")
    lower, where = "a lower learning_rate", "at the same step"
    if rollouts is not None:
        lower, where = f"{lower} or a smaller guidance_weight", "on the same rollout"
    lines.append(
        f"{'Resume from it' if newest else 'Start again'} with {lower}; if it happens again {where}, look for -inf or "
        "NaN in the models' logits (half precision, masked vocabulary)."
    )
    return NonFiniteError(" ".join(lines))


@contextmanager
def naming_nan_in_sampling(step: int, output_dir: str) -> Iterator[None]:
    """Explain the bare RuntimeError with which `generate` refuses to sample from NaN probabilities."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        what = "student's next-token distribution while sampling rollouts"
        raise non_finite_error(what, step, output_dir, None, None, None) from error


class StopOnNonFiniteGradient(TrainerCallback):
    """Checks every gradient before the optimizer steps (not with fp16, whose scaler skips such steps itself)."""

    def __init__(self, raise_error: Any) -> None:
        self.raise_error = raise_error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            return
        name = _first({n: p.grad for n, p in kwargs["model"].named_parameters() if p.grad is not None})
        if name is not None:
            self.raise_error(f"gradient of {name}")


def first_non_finite(model: nn.Module) -> str | None:
    """The first trained weight in this process that is NaN or infinite; None if all are finite."""
    return _first({name: _held_here(each) for name, each in model.named_parameters() if each.requires_grad})


def _held_here(weight: Any) -> torch.Tensor:
    """The part of a weight in this process: a shard, under FSDP or DeepSpeed."""
    shard: torch.Tensor = getattr(weight, "ds_tensor", weight).detach()
    return shard.to_local() if isinstance(shard, DTensor) else shard


def non_finite_weights(name: str, step: int, what: str, output_dir: Path) -> NonFiniteError:
    """The error for weights that must not be saved."""
    newest, _ = newest_whole(output_dir)
    remedy = f"Resume from {newest}, the last complete checkpoint," if newest else "Without a checkpoint, start again"
    return NonFiniteError(
        f"The weight {name} is not finite after step {step}, so {what} was not saved. {remedy} with a lower "
        "learning_rate."
    )


def _first(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that is not finite. Where all are, that takes one transfer from the device."""
    sums = [tensor.sum() for tensor in tensors.values() if tensor.numel()]  # not finite where any entry is not
    if not sums or bool(torch.stack([each.double().to(sums[0].device) for each in sums]).isfinite().all()):
        return None
    # a sum of finite entries may overflow
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
