"""Windows of models whose attention is not plain softmax attention: against full attention, and against fresh prefixes.

Timed is `LocalModel.continue_over_prefix`, as in the case "windows", in process CPU time. The models are random and of
the same width, layers and heads. Sides:

- full attention: a model of the same shape with full attention in every layer. Sliding windows, sinks, capped scores
  and multi-head latent attention (MLA) may take 1.5 x its time.
- generate, one batch: fresh prefixes, left-padded, one call. Models with recurrent layers read their rollout once more,
  in segments, and must be 5 x faster all the same. Of a narrow model, the small operations of decoding steps, which
  both sides have, take most of the time.

Parity: the windows equal those of one-by-one `generate`, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks import Size
from benchmarks.environment import say
from benchmarks.measure import interleave, process_clock, require
from benchmarks.row import Row, time_row
from topd.near_future import LocalModel, Places, Rollouts, ways_of
from topd.near_future.branches import prefill
from topd.near_future.model_parts import backbone_of

FULL, FRESH = "full attention", "generate, one batch"
GATES = {FULL: 1.5, FRESH: 0.2}
VOCABULARY, LAYERS = 8192, 4
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 48, "first_k_dense_replace": LAYERS, "head_dim": 32,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "layer_types": ["linear_attention"] * (LAYERS - 1) + ["full_attention"],
}  # fmt: skip
WIDE = LINEAR | {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "linear_num_value_heads": 8}


class Model(NamedTuple):
    """Names of classes of transformers, `Config` and `ForCausalLM` left out, and options of the config."""

    name: str
    options: dict[str, Any]

    def build(self) -> Any:
        torch.manual_seed(0)
        options = getattr(transformers, self.name + "Config")(**SHAPE | self.options)
        model = getattr(transformers, self.name.removesuffix("Text") + "ForCausalLM")(options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
        return model


class Pair(NamedTuple):
    """A model, and what it is timed against: another model, or its own fresh prefixes (None)."""

    what: str
    model: Model
    full: Model | None


def pairs(window: int) -> list[Pair]:
    """All comparisons; `window`: tokens of the sliding windows."""
    sliding = {"sliding_window": window, "layer_types": ["sliding_attention"] * LAYERS}
    some = sliding | {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
    qwen, all_heads = Model("Qwen3", {}), Model("Qwen3", {"num_key_value_heads": 4})
    capped = {"attn_logit_softcapping": 50.0, "layer_types": ["full_attention"] * LAYERS}
    return [
        Pair(f"sliding windows of {window}", Model("Qwen3", sliding | {"use_sliding_window": True}), qwen),
        Pair(
            f"sliding windows of {window} in half of the layers, sinks", Model("GraniteSWA", some), Model("Granite", {})
        ),
        Pair("capped scores", Model("Gemma2", capped), Model("Gemma2", capped | {"attn_logit_softcapping": None})),
        Pair("MLA", Model("DeepseekV3", LATENT), all_heads),
        Pair("linear attention in 3 of 4 layers", Model("Qwen3_5Text", LINEAR), None),
        Pair("linear attention in 3 of 4 layers, width 512", Model("Qwen3_5Text", WIDE), None),
    ]


class Plan(NamedTuple):
    prefix: int
    branches: int
    length: int
    window: int
    repeats: int


SIZES: dict[Size, Plan] = {
    "tiny": Plan(32, 3, 4, 8, 1),
    "quick": Plan(1024, 16, 32, 256, 3),
    "full": Plan(1024, 16, 32, 256, 7),
}


def rows(size: Size) -> Iterable[Row]:
    plan = SIZES[size]
    for pair in pairs(plan.window):
        say(f"windows: {pair.what}")
        yield _compare(pair, plan)


@torch.no_grad()
def _compare(pair: Pair, plan: Plan) -> Row:
    model = pair.model.build()
    parity = _parity(model.double(), plan)
    ours = Decoding(model.float(), plan)
    sides: dict[str, Callable[[], Any]] = {"ours": ours.over_prefix}
    if pair.full is None:
        ways_of(model)  # which `generate` on prefixes of different lengths would ask for, at the first side's cost
        against, sides[FRESH], repeats = FRESH, ours.fresh, min(plan.repeats, 2)
    else:
        against, sides[FULL], repeats = FULL, Decoding(pair.full.build(), plan).over_prefix, plan.repeats
    timing = interleave(sides, repeats, warmup=int(pair.full is not None), clock=process_clock)
    at = f"1 x {plan.prefix}, {plan.branches} x {plan.length} each, {pair.what}"
    what = "decoding the windows of one rollout over one prefix, process CPU time"
    gate = GATES[against] if plan.prefix >= 1024 else None
    return time_row("windows", against, timing, size=at, what=what, gate=gate, parity=parity)


def _parity(model: Any, plan: Plan) -> str:
    """In float64: a random model has near-ties that float32 decides by the order of its sums."""
    few = Decoding(model, plan._replace(prefix=min(plan.prefix, 32 + plan.window), branches=3, length=8))
    found = few.over_prefix()
    alone = torch.cat([few.source.continue_([prefix], few.plan.length).tokens for prefix in few.prefixes])
    return require("share of other tokens (float64)", float((found != alone).double().mean()), 0.0)


class Decoding:
    """Windows that start in the second half of one random rollout."""

    def __init__(self, model: Any, plan: Plan) -> None:
        torch.manual_seed(1)
        self.plan, self.source = plan, LocalModel(model, 0, [])
        prompt = torch.randint(3, VOCABULARY, (1, 16))
        response = torch.randint(3, VOCABULARY, (1, plan.prefix - 16))
        ones = torch.ones_like(response)
        self.rollouts = Rollouts(prompt, torch.ones_like(prompt), response, ones, ones)
        kept = prefill(backbone_of(model), self.rollouts)
        self.prefill = replace(kept, greedy=model.get_output_embeddings()(kept.hidden).argmax(-1))
        half = response.shape[1] // 2
        positions = torch.randperm(half)[: plan.branches].sort().values + half
        self.places = Places(self.rollouts, torch.zeros_like(positions), positions)
        self.prefixes = self.places.prefixes()

    def over_prefix(self) -> Tensor:
        """[window, window_position]"""
        return self.source.continue_over_prefix(self.places, self.plan.length, self.prefill).tokens

    def fresh(self) -> Tensor:
        """The same, from fresh prefixes."""
        return self.source.continue_(self.prefixes, self.plan.length).tokens
