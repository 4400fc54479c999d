"""Windows decoded from what scoring kept: 16 branches of 32 tokens behind prefixes of 1,024, of 8 rollouts and one.

Timed is `LocalModel.continue_over_prefix`, given the reading (keys, values, greedy tokens) that scoring leaves anyway.
The model is a random Qwen3 and the rollout random tokens, so no window follows the rollout for free: the worst case.
Sides:

- one scoring forward: the same model over the same rollouts once, logits included. This one carries the gate. A
  training batch is decoded in one wave, so 8 rollouts are the usual case; with one, 31 products of 16 rows a layer
  cannot keep the cores as busy as one of 1,024 rows.
- generate, one by one: `generate` from each prefix, a prefill each.
- generate, one batch: all prefixes left-padded, one call.
- copied caches: scoring's keys and values repeated for each branch, decoded together under a 2-D mask.

`special_windows` adds models whose attention is not plain softmax attention.

Parity: all sides give the same tokens on one rollout, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from benchmarks import Size, special_windows
from benchmarks.environment import say
from benchmarks.measure import interleave, require
from benchmarks.models import random_model
from benchmarks.row import Row, time_row
from topd.near_future import LocalModel, Places, Rollouts
from topd.near_future.branches import prefill
from topd.near_future.model_parts import backbone_of

WHAT = "decoding the windows of one rollout over what scoring kept"
FORWARD = "one scoring forward"
GATE = 1.3
PAD = 0


class Plan(NamedTuple):
    rollouts: int
    prefix: int
    branches: int
    length: int
    repeats: int
    peers: bool = True  # whether they are timed; most take minutes on many rollouts


SIZES: dict[Size, list[Plan]] = {
    "tiny": [Plan(2, 32, 3, 4, 1)],
    "quick": [Plan(8, 1024, 16, 32, 3, peers=False), Plan(1, 1024, 16, 32, 1)],
    "full": [Plan(8, 1024, 16, 32, 5), Plan(1, 1024, 16, 32, 7), Plan(2, 4096, 92, 50, 3, peers=False)],
}


def rows(size: Size) -> Iterable[Row]:
    for plan in SIZES[size]:
        say(f"windows: {plan.rollouts} x prefix {plan.prefix}, {plan.branches} branches of {plan.length}")
        yield from _compare(plan)
    yield from special_windows.rows(size)


@torch.no_grad()
def _compare(plan: Plan) -> Iterable[Row]:
    model = random_model(8192, width=256, layers=6, seed=0, positions=2 * plan.prefix).eval()
    _parity(model, plan)
    model.float()
    sides, rollouts = _sides(model, plan, plan.rollouts)
    peers = list(sides)[1:]
    sides[FORWARD] = lambda: model(input_ids=rollouts.input_ids, use_cache=False).logits
    timing = interleave(sides, plan.repeats)
    at = f"{plan.rollouts} x {plan.prefix}, {plan.branches} x {plan.length} each"
    gate = GATE if (plan.prefix, plan.branches, plan.length) == (1024, 16, 32) else None
    parity = "tokens equal (float64)" if plan.prefix <= 1024 else "checked at 1024"
    yield time_row("windows", FORWARD, timing, size=at, what=WHAT, gate=gate, parity=parity)
    for beside in peers:
        yield time_row("windows", beside, timing, size=at, what=WHAT, parity=parity)


def _parity(model: Any, plan: Plan) -> None:
    """In float64: a random model has near-ties that float32 decides by the order of its sums."""
    if plan.prefix > 1024:
        return
    sides, _ = _sides(model.double(), plan._replace(peers=True), rollouts=1)
    expected = sides["ours"]()
    for name, side in sides.items():
        require(f"tokens of {name}", float((side() != expected).double().mean()), 0.0)


def _sides(model: Any, plan: Plan, rollouts: int) -> tuple[dict[str, Callable[[], Any]], Rollouts]:
    torch.manual_seed(1)
    last = plan.prefix - 16
    prompt, response = torch.randint(3, 8192, (rollouts, 16)), torch.randint(3, 8192, (rollouts, last))
    batch = Rollouts(prompt, prompt > 0, response, (response > 0).long(), (response > 0).long())
    kept = prefill(backbone_of(model), batch)
    greedy = model.get_output_embeddings()(kept.hidden).argmax(-1)
    kept = replace(kept, greedy=greedy)
    positions = torch.cat(
        [torch.randperm(last // 2)[: plan.branches].sort().values + last // 2 for _ in range(rollouts)]
    )
    windows = torch.arange(rollouts).repeat_interleave(plan.branches)
    source = LocalModel(model, PAD, [])
    places = Places(batch, windows, positions)
    prefixes = places.prefixes()
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: source.continue_over_prefix(places, plan.length, kept).tokens
    }
    if plan.peers:
        sides["generate, one batch"] = lambda: source.continue_(prefixes, plan.length).tokens
        if rollouts == 1:
            sides["generate, one by one"] = lambda: _one_by_one(source, prefixes, plan.length)
            sides["copied caches"] = lambda: _copied(
                model, kept.prefix, windows, prefixes, greedy, positions, plan.length
            )
    return sides, batch


def _one_by_one(source: LocalModel, prefixes: list[Tensor], length: int) -> Tensor:
    return torch.cat([source.continue_([prefix], length).tokens for prefix in prefixes])


def _copied(
    model: Any, kept: list[tuple[Tensor, Tensor]] | None, rows: Tensor, prefixes: list[Tensor], greedy: Tensor,
    positions: Tensor, length: int,
) -> Tensor:  # fmt: skip
    """Each branch with its own copy of the prefix, shifted to the right so that all end at the same place."""
    assert kept is not None
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    longest = int(lengths.max())
    source = (torch.arange(longest) - (longest - lengths[:, None])).clamp(min=0)
    mask = torch.arange(longest) >= longest - lengths[:, None]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept):
        own_keys, own_values = (x[rows[:, None], :, source].transpose(1, 2).contiguous() for x in (keys, values))
        cache.update(own_keys, own_values, layer)
    fed = greedy[rows, positions]
    tokens = [fed]
    for step in range(length - 1):
        mask = torch.cat([mask, mask.new_ones(len(prefixes), 1)], dim=1)
        logits = model(
            input_ids=fed[:, None], attention_mask=mask, position_ids=(lengths + step)[:, None], past_key_values=cache
        ).logits
        fed = logits[:, -1].argmax(-1)
        tokens.append(fed)
    return torch.stack(tokens, dim=1)
