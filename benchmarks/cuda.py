"""On a CUDA GPU: loss, windows, packed guidance and whole steps at real shapes. One command, under ten minutes.

`python -m benchmarks --case cuda --out FILE.json` on one H200 or H100. Weights are random, made on the device; nothing
is downloaded. Parts:

- loss: V = 151,936, widths 2560 (student) and 2048 (teacher), 4k to 32k tokens, forward and backward: ours
  (`distillation_loss`), TRL 1.16's Triton divergence, naive at 4k. Floor at 790 TFLOP/s: 61 ms at 16,384 tokens, 1.7 GB
  over the inputs.
- windows: a 4 B Qwen3, prefix 16k, 8, 32 and 128 branches of 50 tokens, beside one scoring forward; beside one batch of
  `generate` for 8 branches. Floor: 49 steps that read 8 GB of weights at 4.3 TB/s, 0.09 s.
- packed: the 4 B shape with gradient checkpointing, rollout 8,192 and 64 windows of 50, beside the rollout alone.
- step: OPD and TOPD steps of two 4 B models, 2 rollouts of 2,048 tokens, seconds per stage.

Parity is checked on the CPU by the other cases and the tests; here each side's loss or tokens are compared once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from benchmarks import Size, step
from benchmarks.environment import say
from benchmarks.measure import interleave, relative_difference, require
from benchmarks.row import Row, time_row
from topd.algorithm import Head, distillation_loss, token_kl
from topd.near_future import Branches, LocalModel, Places, Rollouts
from topd.near_future.branches import packed, prefill, rollout_hidden
from topd.near_future.model_parts import backbone_of

PEAK = 790e12
"""bf16 FLOP/s of an H200, measured."""


class Shape(NamedTuple):
    """A model, and how much of it is run."""

    vocabulary: int
    width: int
    teacher_width: int
    layers: int
    heads: int
    groups: int
    head_width: int
    inner: int
    tokens: tuple[int, ...]
    naive_up_to: int
    prefix: int
    branches: tuple[int, ...]
    window: int
    packed: tuple[int, int]
    rollouts: tuple[int, int]
    dtype: torch.dtype


QWEN3_4B = Shape(151936, 2560, 2048, 36, 32, 8, 128, 9728, (4096, 16384, 32768), 4096, 16384, (8, 32, 128), 50,
                 (8192, 64), (2, 2048), torch.bfloat16)  # fmt: skip
TINY = Shape(512, 64, 48, 2, 4, 2, 16, 96, (32,), 32, 64, (3,), 5, (48, 3), (2, 24), torch.float32)
"""For tests, on any device."""


def rows(size: Size) -> Iterable[Row]:
    if size != "tiny" and not torch.cuda.is_available():
        yield Row("cuda", "", note="no CUDA device here; run it on one with torch >= 2.11")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, repeats = (TINY, 1) if size == "tiny" else (QWEN3_4B, 3 if size == "quick" else 5)
    say("cuda: loss")
    yield from _loss(shape, device, repeats)
    say("cuda: windows")
    yield from _windows(shape, device, repeats)
    say("cuda: packed guidance")
    yield from _packed(shape, device, repeats)
    say("cuda: steps")
    yield from _steps(shape, device)


def model_of(shape: Shape, device: torch.device, seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        head_dim=shape.head_width, max_position_embeddings=65536, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model: Any = Qwen3ForCausalLM(config)
    return model.to(shape.dtype)


# ----------------------------------------------------------------------------------------------------------------- loss


def _loss(shape: Shape, device: torch.device, repeats: int) -> Iterable[Row]:
    kwargs: dict[str, Any] = {"device": device, "dtype": shape.dtype}
    head = torch.randn(shape.vocabulary, shape.width, **kwargs).mul_(shape.width**-0.5).requires_grad_()
    theirs_head = torch.randn(shape.vocabulary, shape.teacher_width, **kwargs).mul_(shape.teacher_width**-0.5)
    for tokens in shape.tokens:
        hidden = torch.randn(tokens, shape.width, **kwargs).requires_grad_()
        theirs = torch.randn(tokens, shape.teacher_width, **kwargs)
        sides = _losses(hidden, head, theirs, theirs_head)
        if tokens > shape.naive_up_to:
            del sides["naive"]
        expected = _train(sides["ours"], hidden, head)
        for name, side in list(sides.items())[1:]:
            require(f"gradient of {name}", relative_difference(_train(side, hidden, head), expected), 0.05)
        timing = interleave({name: _training(side, hidden, head) for name, side in sides.items()}, repeats, warmup=1)
        peaks = {name: _peak_gb(_training(side, hidden, head), device) for name, side in sides.items()}
        flops = 2 * shape.vocabulary * tokens * (3 * shape.width + shape.teacher_width)
        for beside in list(sides)[1:]:
            row = time_row("cuda", beside, timing, size=f"loss, T={tokens}", what="loss forward and backward")
            row.note = (
                f"floor at 790 TFLOP/s {flops / PEAK * 1e3:.0f} ms; peak over the inputs {peaks['ours']}, "
                f"its {peaks[beside]} (floor at 16k: 1.7 GB)"
            )
            yield row


def _losses(hidden: Tensor, head: Tensor, theirs: Tensor, theirs_head: Tensor) -> dict[str, Callable[[], Tensor]]:
    ours, teacher = Head(head), Head(theirs_head)
    weights = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    scales = 1.0, 1.0, None, 1.0, None
    return {
        "ours": lambda: distillation_loss(hidden, ours, theirs, teacher, weights).loss,
        "naive": lambda: token_kl(hidden @ head.T, theirs @ theirs_head.T).mean(),
        "TRL 1.16": lambda: ChunkedDivergenceFunction.apply(
            hidden, head, None, theirs, theirs_head, None, 1.0, *scales
        )[0].mean(),
    }


def _training(side: Callable[[], Tensor], hidden: Tensor, head: Tensor) -> Callable[[], Tensor]:
    return lambda: _train(side, hidden, head)


def _train(side: Callable[[], Tensor], hidden: Tensor, head: Tensor) -> Tensor:
    hidden.grad = head.grad = None
    side().backward()
    assert hidden.grad is not None
    return hidden.grad.clone()


def _peak_gb(call: Callable[[], object], device: torch.device) -> str:
    if device.type != "cuda":
        return "not measured"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB"


# -------------------------------------------------------------------------------------------------------------- windows


@torch.no_grad()
def _windows(shape: Shape, device: torch.device, repeats: int) -> Iterable[Row]:
    model = model_of(shape, device, seed=0).eval()
    rollouts = _rollouts(shape, device, 1, shape.prefix)
    kept = prefill(backbone_of(model), rollouts)
    kept = replace(kept, greedy=model.get_output_embeddings()(kept.hidden).argmax(-1))
    source = LocalModel(model, 0, [])
    for count in shape.branches:
        positions = torch.randperm(shape.prefix // 2, device=device)[:count].sort().values + shape.prefix // 2
        places = Places(rollouts, torch.zeros_like(positions), positions)
        sides: dict[str, Callable[[], object]] = {
            "ours": lambda places=places: source.continue_over_prefix(places, shape.window, kept),  # type: ignore[misc]
            "one scoring forward": lambda: backbone_of(model)(input_ids=rollouts.input_ids, use_cache=False),
        }
        if count == shape.branches[0]:
            prefixes = places.prefixes()
            sides["generate, one batch"] = lambda prefixes=prefixes: source.continue_(prefixes, shape.window)  # type: ignore[misc]
        timing = interleave(sides, repeats)
        for beside in list(sides)[1:]:
            size = f"windows, prefix {shape.prefix}, {count} x {shape.window}"
            row = time_row("cuda", beside, timing, size=size, what="windows of one rollout, 4 B shape")
            row.note = f"{timing.median('ours') / (shape.window - 1) * 1e3:.1f} ms a decoded token"
            yield row


def _rollouts(shape: Shape, device: torch.device, rows: int, length: int) -> Rollouts:
    prompt = torch.randint(3, shape.vocabulary, (rows, 16), device=device)
    response = torch.randint(3, shape.vocabulary, (rows, length), device=device)
    ones = torch.ones_like(response)
    return Rollouts(prompt, torch.ones_like(prompt), response, ones, ones)


# --------------------------------------------------------------------------------------------------------------- packed


def _packed(shape: Shape, device: torch.device, repeats: int) -> Iterable[Row]:
    length, count = shape.packed
    model = model_of(shape, device, seed=0).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rollouts = _rollouts(shape, device, 1, length)
    tokens = torch.randint(3, shape.vocabulary, (1, count, shape.window), device=device)
    positions = torch.randperm(length // 2, device=device)[:count].sort().values[None] + length // 2
    branches = Branches(positions, tokens, torch.ones_like(tokens, dtype=torch.bool))
    backbone = backbone_of(model)

    def train(states: Callable[[], tuple[Tensor, ...]]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            sum(part.float().square().mean() for part in states()).backward()  # type: ignore[union-attr]

        return call

    sides = {
        "ours": train(lambda: packed(backbone, rollouts, branches)),
        "the rollout alone": train(lambda: (rollout_hidden(backbone, rollouts),)),
    }
    timing = interleave(sides, repeats)
    peaks = {name: _peak_gb(side, device) for name, side in sides.items()}
    added = count * (shape.window - 1) / length
    yield time_row("cuda", "the rollout alone", timing, size=f"packed, rollout {length}, {count} x {shape.window}",
                   what="forward and backward, gradient checkpointing",
                   note=f"added tokens {added:.0%}; peak {peaks['ours']}, its {peaks['the rollout alone']}",
                   )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- step


def _steps(shape: Shape, device: torch.device) -> Iterable[Row]:
    count, length = shape.rollouts
    pair = step.Pair(
        step.Plan(count, length, shape.window, 1, 0),
        model_of(shape, device, seed=0), model_of(shape, device, seed=1),
        vocabulary=shape.vocabulary,
    )  # fmt: skip
    for row in step.measured(pair, "not checked here", pair.sample()):
        row.case = "cuda"
        row.size = f"step, {row.size}"
        row.gate = row.ok = None
        yield row
