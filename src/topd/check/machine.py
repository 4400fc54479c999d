"""Memory, precision and disk: an estimate of what a run needs on one device, and whether it is there.

P is a number of parameters, b the bytes of one; h, f, q, k the widths of hidden states, feed-forward, queries and keys;
L layers, V tokens in the vocabulary; B rollouts at a time, N tokens of them; K the window length; a the bytes of an
activation. Keys and values are what the cache of a model without storage holds after a few tokens (`tried_cache`):
latents, sliding windows and recurrent states too. Where a model does not run so, they are 2 L k b per token.

    always there    student P b, optimizer 2 P b (AdamW), teacher P b
    sampling        keys and values of N tokens; logits of one token, 2 x B V 4
    looking ahead   keys and values of both models for N tokens, of the whole row and decompressed, at most
                    window_memory, and for the windows, with the recurrent states of each; hidden states N h a of
                    both; two tiles of rows x V x 4
    the loss        gradients P b; hidden states; two tiles; the head's gradient V h 4; activations, of
                    (8 h + 4 f + 4 q + 4 k) a per token and layer, where a is 2.6 under bf16 autocast (norms stay in
                    float32), which also keeps 2 P of weights in bf16; with gradient checkpointing L + 2 times h a, and
                    one layer in full, values and gradients. TRL's own loss (method opd) on a CPU: 12 N V 4 for tiles

The estimate is what is always needed plus the largest of the three phases. The formula for activations was counted on
Qwen3 and Llama blocks (within 20 %); fragmentation, the libraries themselves and other processes are not included. Our
choice.
"""

import math
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from topd.algorithm.vocabulary import tile_rows
from topd.check.cache_size import CacheSize, tried_cache
from topd.check.findings import Finding, fails, ok, warns
from topd.check.setup import ModelInfo, Setup
from topd.loading.precision import REMEDY, lost_in_rounding
from topd.loading.sharding import sharded
from topd.near_future.recurrent_states import BRANCHES_AT_ONCE

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STATES = {"8bit": 2.0, "4bit": 1.0, "sgd": 0.0, "adafactor": 0.01, "lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0}
"""Bytes of optimizer state per parameter, by a part of its name; others keep two values of the parameter's dtype."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes for the formulas."""

    parameters: int
    bytes: int
    layers: int
    hidden: int
    layer_elements: int  # values kept for the backward pass, per token and layer
    vocabulary: int
    cache: CacheSize

    @property
    def weights(self) -> float:
        return self.parameters * self.bytes


@cache
def shape(model: ModelInfo, dtype: str) -> Shape:
    """From the config; parameters are counted, and the cache is tried, on a model without storage."""
    config: Any = model.text_config
    stored = stored_dtype(model, dtype)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            deepcopy(model.config), trust_remote_code=False, dtype=getattr(torch, stored)
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None)
    feed_forward = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if experts and getattr(config, "moe_intermediate_size", None):
        feed_forward = experts * config.moe_intermediate_size
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    per_token = 2.0 * config.num_hidden_layers * keys * BYTES[stored]
    elements = 8 * config.hidden_size + 4 * feed_forward + 4 * heads * width + 4 * keys
    parameters = sum(p.numel() for p in empty.parameters())
    kept = tried_cache(empty) or CacheSize(((per_token, math.inf),), 0.0, per_token)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    return Shape(parameters, BYTES[stored], layers, hidden, elements, config.vocab_size, kept)


def stored_dtype(model: ModelInfo, dtype: str) -> str:
    """The dtype of the weights: the given one, or the config's for "auto"."""
    name = str(model.config.dtype or "float32") if dtype == "auto" else dtype
    return name.removeprefix("torch.")


def needs(setup: Setup, student: Shape, teacher: Shape) -> dict[str, dict[str, float]]:
    """Bytes by phase and part; see the module."""
    config = setup.config
    if not setup.teacher_here:
        teacher = replace(teacher, parameters=0, layers=0, hidden=0, cache=CacheSize((), 0.0, 0.0))
    rollouts = config.per_device_train_batch_size
    at_once = rollouts * config.gradient_accumulation_steps  # sampled and looked at together
    prompt, teacher_prompt = (max(map(len, sample.values())) for sample in (setup.sample, setup.teacher_sample))
    response = config.max_completion_length or 0
    tokens, response_tokens = prompt + response, response * at_once
    widest = max(prompt, teacher_prompt) + response
    trained = student.parameters * (0.01 if setup.adapters else 1)
    optimizer = str(getattr(config.optim, "value", config.optim))
    state = next((size for name, size in _STATES.items() if name in optimizer), 2 * student.bytes)
    activation = 2.6 if autocasts(setup) else float(student.bytes)

    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    tiles = 2 * tile_rows(student.vocabulary, None, device) * student.vocabulary * 4.0
    if device.type == "cpu" and not (config.looks_ahead or config.opd_in_one_pass):
        tiles = 12.0 * rollouts * response * student.vocabulary * 4  # TRL's loss without Triton, as measured
    windows = (config.candidate_share or 0.05) * response * config.window_length if config.looks_ahead else 0.0
    states = response_tokens * (student.hidden + teacher.hidden) * float(student.bytes)
    prefix = student.cache.prefix + teacher.cache.prefix
    branches = min(at_once * windows / config.window_length, BRANCHES_AT_ONCE) if windows else 0.0
    in_loss = rollouts * (tokens + (0.7 * windows if config.guides else 0.0))
    per_layer = in_loss * student.layer_elements * activation
    checkpointed = (student.layers + 2) * in_loss * student.hidden * activation + 2 * per_layer

    return {
        "always": {
            "student": student.weights,
            "optimizer": trained * state,
            "teacher": 0.0 if setup.one_base else teacher.weights,
        },
        "sampling": {
            "keys and values": 0.0 if config.use_vllm else at_once * student.cache.of(tokens),
            "logits": 2.0 * at_once * student.vocabulary * 4,
        },
        "looking ahead": {
            "keys and values": min(config.window_memory * GIB, at_once * widest * prefix)
            if config.looks_ahead
            else 0.0,
            "windows": at_once * windows * prefix + branches * max(student.cache.states, teacher.cache.states),
            "hidden states": states,
            "loss tiles": tiles,
        },
        "the loss": {
            "gradients": trained * student.bytes,
            "activations": checkpointed if config.gradient_checkpointing else per_layer * student.layers,
            "weights in bf16": 2.0 * student.parameters if autocasts(setup) and student.bytes > 2 else 0.0,
            "hidden states": states,
            "loss tiles": tiles,
            "head's gradient": 0.0 if setup.adapters else student.vocabulary * student.hidden * 4.0,
        },
    }


def autocasts(setup: Setup) -> bool:
    """Whether the loss is computed under autocast. TRL's own loss uses autocast only with sharded weights."""
    config = setup.config
    ours = config.looks_ahead or config.opd_in_one_pass or not setup.teacher_here
    return bool(config.bf16 or config.fp16) and (ours or sharded())


def available(setup: Setup) -> tuple[float, str]:
    """Free bytes, and where."""
    if torch.cuda.is_available() and not setup.config.use_cpu:
        return float(torch.cuda.mem_get_info()[0]), f"free on {torch.cuda.get_device_name()}"
    return float(psutil.virtual_memory().available), "of RAM available"


def memory(setup: Setup) -> Finding:
    try:
        shapes = [shape(model, setup.dtypes[model.role]) for model in setup.pair]
    except (ValueError, AttributeError, KeyError) as error:
        return warns(f"cannot be estimated for this architecture ({error})", "Watch the first step.")
    phases = needs(setup, *shapes)
    always = phases.pop("always")
    name, largest = max(phases.items(), key=lambda phase: sum(phase[1].values()))
    total = sum(always.values()) + sum(largest.values())
    free, where = available(setup)
    parts = [f"{part} {human_size(size)}" for part, size in (always | largest).items() if size > 0.02 * total]
    found = (
        f"about {human_size(total)} at the peak ({name}): {', '.join(parts)}; {human_size(free)} {where}. Parameters: "
        f"{shapes[0].parameters / 1e6:,.1f} M (student), {shapes[1].parameters / 1e6:,.1f} M (teacher)"
    )
    if sharded():
        return ok(f"{found}. Sharding, which divides weights, gradients and optimizer, is not counted")
    remedy = _REMEDIES.get(
        max((always | largest).items(), key=lambda part: part[1])[0],
        "A smaller --per_device_train_batch_size or --max_completion_length.",
    )
    if total > 1.5 * free:
        return fails(found, remedy)
    return warns(found, remedy) if total > 0.9 * free else ok(found)


_REMEDIES = {
    "optimizer": "Train adapters (--use_peft true) or use --optim adamw_torch_8bit, or shard with FSDP.",
    "student": "Train adapters (--use_peft true) with --dtype bfloat16, or shard with FSDP.",
    "gradients": "Train adapters (--use_peft true), or shard with FSDP.",
    "teacher": '--teacher_model_init_kwargs \'{"dtype": "bfloat16"}\', or shard with FSDP.',
    "activations": "--gradient_checkpointing true, or a smaller --per_device_train_batch_size with more "
    "--gradient_accumulation_steps.",
    "keys and values": "A smaller --per_device_train_batch_size, --max_completion_length or --window_memory.",
}
"""By the largest part of the estimate."""


def human_size(size: float) -> str:
    """1234567890 is 1.1 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def precision(setup: Setup) -> Finding:
    """Whether the optimizer's updates survive the rounding of the student's weights."""
    config = setup.config
    stored = {model.role: stored_dtype(model, setup.dtypes[model.role]) for model in setup.pair}
    computed = "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "as stored"
    if not autocasts(setup):
        computed = "as stored" + (" (TRL's loss does not autocast; opd_loss=one_pass does)" if config.bf16 else "")
    found = f"weights {stored['student']} (student), {stored['teacher']} (teacher); computed {computed}"
    if config.bf16 and sharded() and stored["student"] != "float32":
        return ok(f"{found}; sharded training keeps float32 weights of the student")
    lost = lost_in_rounding(stored["student"], config.learning_rate)
    if lost is not None and not setup.adapters:
        return warns(f"{found}. {lost}", REMEDY)
    return ok(found)


def disk(setup: Setup) -> Finding:
    """Room for the checkpoints: weights and two optimizer values per weight."""
    config = setup.config
    student = shape(setup.student, setup.dtypes["student"])
    one = student.weights * (0.03 if setup.adapters else 3)
    steps = config.max_steps if config.max_steps > 0 else None
    kept = (
        config.save_total_limit or (steps and config.save_steps >= 1 and max(1, round(steps / config.save_steps))) or 1
    )
    folder = Path(str(config.output_dir)).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return fails(
            f"cannot write to {config.output_dir}: {folder} is not a folder, or is not writable",
            "Use another --output_dir, or change its permissions.",
        )
    free = shutil.disk_usage(folder).free
    needed = one * (kept + 1)  # a new one is written before an old one is deleted
    found = (
        f"a checkpoint takes about {human_size(one)}, {kept} and one being written {human_size(needed)}; "
        f"{human_size(free)} free"
    )
    if needed > free:
        report = fails if 2 * one > free else warns
        return report(found, "--save_total_limit 2, a larger --save_steps, or another --output_dir.")
    return ok(found)
