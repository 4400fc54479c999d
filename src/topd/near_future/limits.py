"""Lengths at which an architecture changes how it treats a row, read from its config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

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
