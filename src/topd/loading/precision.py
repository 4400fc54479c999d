"""The precision that a step computes in, and whether the optimizer's updates survive the rounding of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from topd.near_future.model_parts import backbone_of, inside_peft

logger = logging.getLogger(__name__)

WEIGHT = 0.02
"""Typical size of a weight."""
HALF_A_STEP = {"bfloat16": 2**-9, "float16": 2**-12, "float32": 2**-25}
"""Updates below this share of a weight are always rounded away."""
REMEDY = (
    "--dtype float32 --bf16 true keeps the student's weights in float32 and computes in bfloat16; "
    '--teacher_model_init_kwargs \'{"dtype": "bfloat16"}\' keeps the teacher small. Or train adapters (--use_peft '
    "true), or use a larger learning rate."
)


def lost_in_rounding(dtype: str, learning_rate: float) -> str | None:
    """A warning if updates of this size are rounded away; None otherwise.

    Neighbouring bfloat16 values differ by 1/256 to 1/128 of their size, so an update below 1/512 of a weight is always
    rounded away. AdamW changes a weight by about the learning rate.
    """
    least = WEIGHT * HALF_A_STEP.get(dtype, HALF_A_STEP["float32"])
    if learning_rate >= least:
        return None
    return (
        f"A learning rate of {learning_rate:g} is lost in rounding: {dtype} weights near {WEIGHT} need {least:.0e} to "
        "change at all"
    )


def watch_rounding(trainer: Any) -> None:
    """Make a trainer warn of updates that are rounded away. DeepSpeed keeps float32 weights and loses none."""
    if not trainer.is_deepspeed_enabled:
        trainer.add_callback(RoundingWarning())


class RoundingWarning(TrainerCallback):
    """Warns once, when training begins, by the dtype that the trained weights then have.

    (FSDP2 has made them float32 by then; adapters are float32 on any base.)
    """

    _done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._done or not state.is_world_process_zero:
            return
        self._done = True
        for dtype in {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}:
            if lost := lost_in_rounding(str(dtype).removeprefix("torch."), args.learning_rate):
                logger.warning(f"{lost}. {REMEDY}")


@contextmanager
def autocasting(models: Sequence[Any], accelerator: Accelerator) -> Iterator[None]:
    """Run unwrapped models and their backbones under the accelerator's autocast (`bf16`, `fp16`) in this block.

    accelerate autocasts the forward pass of a whole model. Scoring, windows and the loss call its backbone directly,
    and `generate` of a PEFT model the model inside: without this function, float32 weights would compute in float32
    despite `bf16`, in one process and under DDP. A backbone returns states in autocast's dtype, which the output head
    takes. FSDP2 and DeepSpeed have their own precision; nothing changes there.
    """
    with ExitStack() as stack:
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if accelerator.native_amp and not sharded:
            parts = dict.fromkeys(part for model in models for part in (model, inside_peft(model), backbone_of(model)))
            for module in parts:
                stack.enter_context(patch.object(module, "forward", _autocast(module.forward, accelerator)))
        yield


def _autocast(usual: Callable[..., Any], accelerator: Accelerator) -> Callable[..., Any]:
    @wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            output = usual(*args, **kwargs)
            states = getattr(output, "last_hidden_state", None)
            if states is not None:
                output.last_hidden_state = states.to(torch.get_autocast_dtype(states.device.type))
        return output

    return forward
