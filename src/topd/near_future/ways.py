"""Which fast paths of running a model give exactly the results of the slow path: each model is tested once.

The slow path runs every sequence alone, without padding and without a cache. Fast paths share work: several prompts in
one batch (left padding), all windows over one prefix, windows after their rollout in one row, states kept from
sampling. Whether they are exact depends on the architecture. So each model is tested on a few random tokens before its
first use (`self_check`), and a path whose results differ is not used.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.version import Version

from topd.errors import ContextError, TOPDError
from topd.near_future.model_parts import grouped

if TYPE_CHECKING:
    from topd.near_future.windows import Rollouts


class ArchitectureError(TOPDError, RuntimeError):
    """A model cannot be distilled: its states or logits are not those of a causal language model."""


@dataclass(frozen=True)
class Batching:
    """Which rows may share a batch.

    Attributes:
        left_padding: rows of different lengths, padded on the left.
        batches: rows of equal length in `generate`.
        leaving: rows of `generate` that have ended may leave the others.
        reasons: why a path is not exact.
    """

    left_padding: bool = True
    batches: bool = True
    leaving: bool = True
    reasons: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Ways(Batching):
    """Fast paths that are exact for one model. Lengths are tokens of the longest row, prompt to the end of its window.

    Attributes:
        shared_prefix: rows up to this length may decode their windows over one prefix; `inf`: all, 0: none.
        packed_rows: the same for windows after their rollout in one row, with gradients.
        sampling_states: the same for the states that sampling computes.
        trains: a backward pass works.
        trl: where TRL's own forward pass, which passes no position ids, is exact.
        switch: length beyond which the model rotates all positions differently (LongRoPE); None: it never does.
        end: length beyond which states are not defined by the row alone (dynamic NTK); such rows are refused.
        cached_prefix: windows may be decoded over the cache of `generate`: it holds keys and values as attention gets
            them, not latents.
        cache_bytes: bytes that a kept prefix takes per token, all layers, as measured.
    """

    shared_prefix: float = math.inf
    packed_rows: float = math.inf
    sampling_states: float = math.inf
    trains: bool = True
    trl: Literal["always", "without left padding", "never"] = "always"
    switch: int | None = None
    end: int | None = None
    cached_prefix: bool = True
    cache_bytes: float = 0.0

    def together(self, lengths: Sequence[int], paddings: Sequence[int], growth: int = 0) -> list[list[int]]:
        """Which rows may share a batch, as groups of row numbers.

        Args:
            lengths: tokens of each row, without padding.
            paddings: padding on the left that each row would have.
            growth: tokens that each row may grow by while it is in the batch.

        Raises:
            ContextError: a row is longer than `end`.
        """
        if self.end is not None and max(lengths) + growth > self.end:
            raise ContextError(
                f"A row of {max(lengths) + growth} tokens is longer than {self.end}, beyond which this model's states "
                f"are not defined by the row alone ({self.reasons.get('end', 'dynamic RoPE scaling')}). Use shorter "
                "rows, for dynamic RoPE another rope_type (yarn, linear), or for LongRoPE transformers "
                f"{ACROSS_SWITCH} or later."
            )
        crosses = self.switch is not None and min(lengths) <= self.switch < max(lengths) + growth
        alike = crosses and growth > 0  # a row that crosses the switch alone would recompute the others' keys
        return grouped(
            [
                (
                    0 if self.left_padding else padding,
                    length if alike else None,
                    self.switch is not None and length > self.switch,
                )
                for length, padding in zip(lengths, paddings, strict=True)
            ]
        )

    def alike(self, lengths: Sequence[int], width: int) -> bool:
        """Whether a batch of that width (padding counts) rotates all of its rows as each alone would be."""
        if self.end is not None and width > self.end:
            return False
        return self.switch is None or width <= self.switch or min(lengths) > self.switch

    def rows_together(self, rollouts: Rollouts) -> list[list[int]]:
        """Which rollouts may share a forward pass."""
        if self.left_padding and self.switch is None and self.end is None:
            return [list(range(len(rollouts)))]
        paddings = (rollouts.prompt_mask == 0).sum(1).tolist()
        return self.together(rollouts.attention_mask.sum(1).tolist(), paddings)


EXACT = Ways()
"""Every way."""
_TRYING = RLock()
"""Threads of a server try a model one after the other."""
_KNOWN: WeakKeyDictionary[Any, dict[str | None, Ways]] = WeakKeyDictionary()


@torch.no_grad()
def ways_of(model: Any, in_step: bool = False) -> Ways:
    """Which fast paths are exact for this model. The first call tests them (a few dozen tokens).

    One warning names those that are not, and why. Under FSDP or DeepSpeed, call it while the model is unsharded.

    Args:
        model: a causal language model of transformers; a PEFT model is fine.
        in_step: all processes must run the model equally often (FSDP, DeepSpeed), so no choice may depend on lengths.

    Raises:
        ArchitectureError: no path is right, or the output head does not give the model's logits; or the model must
            run rows in groups, which processes cannot do in step.
    """
    from topd.near_future.self_check import check_model  # it runs the ways, which ask here

    attention = getattr(model.config, "_attn_implementation", None)
    known = _KNOWN.setdefault(model, {})
    with _TRYING:
        if attention in known:
            return known[attention]
        known[attention] = in_step_of(model, check_model(model)) if in_step else check_model(model)
        notice = notice_of(model, known[attention])
        if notice:
            warnings.warn(notice, stacklevel=2)
    return known[attention]


def in_step_of(model: Any, ways: Ways) -> Ways:
    """The same without choices that depend on a row's length."""
    if not ways.left_padding or ways.switch is not None:
        raise ArchitectureError(
            f"{type(model).__name__} must run rows in groups (left padding or LongRoPE), which processes that share "
            "its parts cannot do in step: use one process or DDP instead of FSDP or DeepSpeed."
        )
    shared, packed, sampling = (
        reach if reach == math.inf else 0 for reach in (ways.shared_prefix, ways.packed_rows, ways.sampling_states)
    )
    return replace(ways, shared_prefix=shared, packed_rows=packed, sampling_states=sampling)


def notice_of(model: Any, ways: Ways) -> str | None:
    """The warning about slower paths of a model; None if every fast path is exact at all lengths."""
    costs = {
        "shared_prefix": (ways.shared_prefix, "windows are generated from fresh prefixes"),
        "packed_rows": (ways.packed_rows, "each guided window runs after its own copy of the prefix"),
        "sampling_states": (ways.sampling_states, "sampled rollouts need another forward pass"),
    }
    parts = []
    for name, (longest, cost) in costs.items():
        if longest == math.inf:
            continue
        where = "" if longest == 0 else f" where a row is longer than {int(longest):,} tokens"
        parts.append(f"{cost}{where} ({ways.reasons.get(name, 'not exact otherwise')})")
    if not ways.batches:
        parts.append(
            f"windows are generated one at a time ({ways.reasons['batches']}), and rollouts that are sampled in a "
            "batch are not the model's own"
        )
    if not ways.left_padding:
        parts.append(
            f"prompts of different lengths run one after the other ({ways.reasons.get('left_padding', 'not exact')})"
        )
    if not parts:
        return None
    return f"{type(model).__name__} uses slower paths, which give the same results: {'; '.join(parts)}."


# --------------------------------------------------------------- lengths at which a model changes, read from its config


LIMIT = re.compile(r"window|chunk|top_?k|block|span|local|keep|compress")
"""Names of config entries that may say how far attention reaches."""
NO_LIMIT = re.compile(
    r"expert|moe|group|layers|pattern|feed_forward|mamba|^chunk_size|^block_size|multiple|logits|gate|vocab"
)
READ_EACH_TIME = ("sliding_window", "attention_chunk_size")
"""Limits that every forward pass reads from the config: if lowering them changes nothing, they are not in use."""
SHORT = 16
"""A limit up to this is seen by a check on rows of this length."""
LOWERED = 5
ACROSS_SWITCH = Version("5.20")
"""The first transformers whose `generate` is right where a row grows beyond LongRoPE's switch."""
FAR = 2**30


@dataclass(frozen=True)
class Lengths:
    """Where a model changes."""

    model: Any
    # entries of its config that may bound attention, and are too long to be tried as they are
    limits: dict[str, int] = field(default_factory=dict)
    switch: int | None = None  # length beyond which all positions are rotated otherwise (LongRoPE)
    # length beyond which rotations depend on what ran before (dynamic NTK), so that nothing is exact
    end: int | None = None

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """With all limits at a few tokens, in configs and in modules."""
        with replaced(self.model, dict.fromkeys(self.limits, LOWERED), self.limits):
            yield

    @contextmanager
    def out_of_reach(self) -> Iterator[None]:
        """With switch and end beyond any row."""
        if self.switch is None and self.end is None:
            yield
            return
        name = "original_max_position_embeddings"
        with ExitStack() as stack:
            for rope in ropes_of(self.model.config):
                if name in rope:
                    stack.enter_context(patch.dict(rope, {name: FAR}))
            names = {name: FAR, "max_seq_len_cached": FAR, "original_max_seq_len": FAR}
            stack.enter_context(replaced(self.model, names))
            yield


def lengths_of(model: Any) -> Lengths:
    """Read them from the config of a model."""
    config = model.config.get_text_config()
    limits = {
        name: value
        for name, value in vars(config).items()
        if type(value) is int and value > SHORT and LIMIT.search(name) and not NO_LIMIT.search(name)
    }
    switch = end = None
    for rope in ropes_of(model.config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope":
            switch = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            if Version(transformers.__version__) < ACROSS_SWITCH:
                end = switch
        if kind is not None and "dynamic" in kind:
            end = config.max_position_embeddings
    return Lengths(model, limits, switch, end)


def ropes_of(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a config: one set, or one for each type of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    return [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]


@contextmanager
def replaced(model: Any, values: dict[str, int], only: dict[str, int] | None = None) -> Iterator[None]:
    """Set attributes of these names in all configs and modules; with `only`, where they have that value."""
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))}
    owners |= {id(c): c for c in [model.config.get_text_config()]}
    found = [
        (owner, name)
        for owner in owners.values()
        if owner is not None
        for name in values
        if name in vars(owner) and (only is None or vars(owner)[name] == only[name])
    ]
    with ExitStack() as stack:
        for owner, name in found:
            stack.enter_context(patch.object(owner, name, values[name]))
        yield
