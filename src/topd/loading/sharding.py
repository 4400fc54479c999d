"""Sharded models: gathered while a batch is sampled and windows are decoded, sharded while the student is trained.

DDP keeps a whole model in every process. FSDP2 and DeepSpeed ZeRO-3 shard it, and gather each layer for every forward
pass, which all processes must run in step. Windows differ in number and length between processes, so they cannot be
decoded in step; gathering the shards once for all windows also costs far less than once per token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from trl.models.utils import unwrap_model_for_generation

from topd.errors import TOPDError


def sharded(args: Any = None) -> bool:
    """Whether `accelerate launch` shards the weights, or these training arguments do."""
    launched = any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("FSDP", "DEEPSPEED"))
    return launched or (args is not None and bool(args.fsdp or args.deepspeed))


def check_one_gpu(args: Any) -> None:
    """Raise `TOPDError` if this process has several GPUs: TRL would spread a model over them."""
    if args.n_gpu > 1:
        raise TOPDError(
            f"This process sees {args.n_gpu} GPUs, and TOPD uses one per process. Start one process per GPU "
            f"(topd train --num_processes {args.n_gpu}, or accelerate launch), or use one: CUDA_VISIBLE_DEVICES=0."
        )


@contextmanager
def held_whole(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """Gather all parameters of a model, as accelerate wrapped it, in every process: the block needs no other one."""
    with (
        without_checkpointing(model),
        unwrap_model_for_generation(model, accelerator) as unwrapped,
        unsharded(unwrapped),
    ):
        yield


@contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Switch gradient checkpointing off for a while; its options stay.

    TRL's `disable_gradient_checkpointing` loses them, and transformers adds a hook to the embeddings each time it is
    switched on. It does nothing where checkpointing is off.
    """
    parts = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Gather what FSDP2 has sharded, once for all forward passes in this block. Without FSDP2, do nothing."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parts:
        model._get_fsdp_state()._lazy_init()  # as before a first forward pass: see the end
    resharding = {  # there is no public API for this; the root never reshards
        part: any(group.post_forward_mesh_info is not None for group in part._get_fsdp_state()._fsdp_param_groups)
        for part in parts
        if part is not model
    }
    for part in resharding:
        part.set_reshard_after_forward(False, recurse=False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        if parts:
            # Reshard, and forget the forward passes: FSDP would otherwise use them to prefetch layers in the next
            # backward pass, differently in each process.
            model.reset_iter_state()
        for part, reshards in resharding.items():
            part.set_reshard_after_forward(reshards, recurse=False)


def shard_teacher(teacher: Any, accelerator: Accelerator) -> Any:
    """Shard the teacher as accelerate shards the student. (TRL 1.16 leaves it unsharded, on its first device.)

    Raises `TOPDError` with FSDP1, whose shards cannot stay gathered during a forward pass.
    """
    if not accelerator.is_fsdp2:
        raise TOPDError(
            "TOPD works with FSDP2, not with FSDP1: set fsdp_version to 2 in the accelerate config (--fsdp_version 2)."
        )
    return fsdp2_prepare_model(accelerator, teacher.requires_grad_(False)).eval()
