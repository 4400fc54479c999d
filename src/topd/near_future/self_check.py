"""Try every way of running a model on a few random tokens, and compare with the plain way.

Two prompts of different lengths with their rollouts, and two windows behind each. The truth is every sequence alone,
unpadded and without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from topd.near_future.branches import packed, prefill, rollout_hidden, separate
from topd.near_future.continuations import Decoder, Start, continue_over_prefix
from topd.near_future.model_parts import (
    UNREAD_BY_TRL,
    backbone_of,
    evaluating,
    inside_peft,
    last_states,
    left_padded,
    own_settings_only,
    training,
    without_autocast,
)
from topd.near_future.plain_way import (
    PROMPTS,
    RESPONSE,
    alone,
    generated,
    gradient_error,
    gradients_of,
    in_words,
    padding_of,
    sample_of,
    small_parameters,
    stop_unless_causal,
    stop_unless_generates,
    stop_unless_head,
)
from topd.near_future.recurrent_states import empty_cache, is_recurrent
from topd.near_future.sampling import after_the_others_left
from topd.near_future.ways import FAR, READ_EACH_TIME, ArchitectureError, Batching, Lengths, Ways, lengths_of
from topd.near_future.windows import Branches, Places, Prefill, Rollouts

FAST = ("shared_prefix", "packed_rows", "sampling_states")
TRL = ("always", "without left padding", "never")


def check_model(model: Any) -> Ways:
    """Try all ways on a model that is held whole.

    Raises:
        ArchitectureError: the plain way is not that of a causal language model, or the head is not the model's.
    """
    with plainly(model) as (inner, lengths):
        check = Check(inner)
        ways = check.ways()
        if lengths.limits:
            ways = beyond_limits(check, lengths, ways)
    ends = [end for end in (ways.end, lengths.end) if end is not None]
    longest = min([*ends, lengths.switch or math.inf])
    bounded = {name: min(getattr(ways, name), longest) for name in FAST}
    kept = ways.cache_bytes if bounded["shared_prefix"] else 0.0
    return replace(ways, **bounded, switch=lengths.switch, end=min(ends, default=None), cache_bytes=kept)


@torch.no_grad()
def batching_of(model: Any, longest: int) -> Batching:
    """For code that only generates: which prompts may share a batch and get the responses that they get alone.

    Tried with two short random ones, as `check_model` does.

    Args:
        model: any causal language model of transformers; a PEFT model is fine.
        longest: tokens of the longest prompt and its response.
    """
    with plainly(model) as (inner, lengths):
        try:
            found = Check(inner).batching()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # alone, its responses are right all the same
            return Batching(False, False, False, {"batches": f"it could not be tried: {in_words(error)}"})
    for limit in (lengths.switch, lengths.end):
        if found.left_padding and limit is not None and longest > limit:
            reason = f"rotary embeddings depend on the longest row beyond {limit:,} tokens"
            return Batching(False, True, False, {"left_padding": reason})
    return found


@contextmanager
def plainly(model: Any) -> Iterator[tuple[Any, Lengths]]:
    """The model without a PEFT wrapper, run by its weights and the given settings alone; and its lengths."""
    inner = inside_peft(model)
    lengths, device_type = lengths_of(inner), next(inner.parameters()).device.type
    with evaluating(model), own_settings_only(inner), without_autocast(inner, device_type), lengths.out_of_reach():
        yield inner, lengths


def beyond_limits(check: Check, lengths: Lengths, ways: Ways) -> Ways:
    """The ways of a model that changes at some length: beyond it, what is exact with that length lowered."""
    nearest = min(lengths.limits.values())
    names = ", ".join(f"{name} = {value:,}" for name, value in lengths.limits.items())
    with lengths.lowered():
        lowered = Check(check.model)
        if check.sample.error(lowered.sample.window_states, check.sample.window_states) is None:
            unknown = [value for name, value in lengths.limits.items() if name not in READ_EACH_TIME]
            nearest, there = min(unknown, default=FAR), None if unknown else ways
        else:
            try:
                there = lowered.ways()
            except ArchitectureError as error:
                return replace(ways, end=nearest, reasons=ways.reasons | {"end": str(error)})
    reach = {name: getattr(ways, name) for name in FAST}
    reasons = dict(ways.reasons)
    for name in FAST:
        if reach[name] and not (there and getattr(there, name)):
            reach[name] = float(nearest)
            reasons[name] = names
    if there is None:
        return replace(ways, **reach, reasons=reasons)
    both = {name: getattr(ways, name) and getattr(there, name) for name in ("left_padding", "leaving")}
    return replace(ways, **reach, **both, trl=max(ways.trl, there.trl, key=TRL.index), reasons=reasons)


class Check:
    """The ways of one model, tried one after the other.

    Args:
        model: without a PEFT wrapper (its adapters stay in place).
    """

    def __init__(self, model: Any) -> None:
        self.model, self.backbone = model, backbone_of(model)
        self.reasons: dict[str, str] = {}
        self.cache_bytes, self.cached_prefix, self.trains = 0.0, False, True
        self.small = small_parameters(model, self.backbone)
        try:
            self.sample = sample_of(model, self.backbone)
        except Exception as error:
            raise ArchitectureError(
                f"{type(model).__name__} does not run on text alone ({in_words(error)}). TOPD distils causal language "
                "models."
            ) from error

    def ways(self) -> Ways:
        stop_unless_causal(self.model, self.sample)
        stop_unless_head(self.model, self.sample)
        self.trains = self._try("trains", self._trains)
        padded = self._try("left_padding", self._padded)
        sampled = self._try("sampling_states", self._sampled)
        if not sampled:
            stop_unless_generates(self.model, self.sample)
        if padded and not sampled:
            padded = self._try("left_padding", self._padded_tokens)
        return Ways(
            shared_prefix=math.inf if self._try("shared_prefix", self._shared_prefix) else 0,
            packed_rows=math.inf if self._try("packed_rows", self._packed_rows) else 0,
            sampling_states=math.inf if padded and sampled else 0,
            left_padding=padded,
            batches=padded or self._try("batches", self._batched_tokens),
            leaving=padded and self._try("leaving", self._leaving),
            trl=self._trl(),
            cached_prefix=self.cached_prefix,
            trains=self.trains,
            cache_bytes=self.cache_bytes,
            reasons=self.reasons,
        )

    def _try(self, name: str, way: Callable[[], str | None]) -> bool:
        try:
            reason = way()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = in_words(error)
        if reason is not None:
            self.reasons[name] = reason
        return reason is None

    def batching(self) -> Batching:
        """Which prompts `generate` may continue together."""
        if self._try("left_padding", self._padded) and self._try("left_padding", self._padded_tokens):
            return Batching(leaving=self._try("leaving", self._leaving))
        return Batching(False, self._try("batches", self._batched_tokens), False, self.reasons)

    def _leaving(self) -> str | None:
        """The longest prompt, which is the last one, must continue as alone where the other one leaves the batch."""
        pad, prompts = padding_of(self.model), self._prompts([0, 0])
        tokens = after_the_others_left(self.model, *left_padded(prompts, pad), pad)
        return self.sample.below_best(self.model, prompts[-1], tokens)

    def _padded(self) -> str | None:
        rollouts = self.sample.rollouts

        def on_the_left() -> Tensor:
            states = last_states(self.backbone, rollouts.input_ids, rollouts.attention_mask)
            return states[:, max(PROMPTS) - 1 : -1]

        def on_the_right() -> Tensor:
            return rollout_hidden(self.backbone, rollouts)

        errors = (
            self.sample.error(padded(), self.sample.response_states) or self._gradient_error(padded, self._apart)
            for padded in (on_the_left, on_the_right)
        )
        return next(filter(None, errors), None)

    def _apart(self) -> Tensor:
        """States of the rollouts, each without padding."""
        return rollout_hidden(self.backbone, self.sample.rollouts, Ways(left_padding=False))

    def _trl(self) -> Literal["always", "without left padding", "never"]:
        if self._try("trl", lambda: self._as_trl(self.sample.rollouts)):
            return "always"
        return "without left padding" if self._try("trl", lambda: self._as_trl(self.sample.rollouts[1:])) else "never"

    def _as_trl(self, rollouts: Rollouts) -> str | None:
        for name in UNREAD_BY_TRL:
            if getattr(self.model.config.get_text_config(), name, None) not in (None, 1.0):
                return f"it does not read {name}"
        inputs = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask, "use_cache": False}

        def as_trl() -> Tensor:
            states: Tensor = self.model.base_model(**inputs).last_hidden_state
            return states[:, max(PROMPTS) - 1 : -1]

        truth = self.sample.response_states[-len(rollouts) :]
        return self.sample.error(as_trl(), truth) or self._gradient_error(
            as_trl, lambda: self._apart()[-len(rollouts) :]
        )

    def _packed_rows(self) -> str | None:
        if is_recurrent(empty_cache(self.backbone)):  # small weights could hide it
            return "a recurrent state takes in every token of a row"
        rollouts, branches = self.sample.rollouts, self.sample.branches
        row, windows = packed(self.backbone, rollouts, branches)
        return (
            self.sample.error(row, self.sample.response_states)
            or self.sample.error(windows, self.sample.window_states)
            or self._gradient_error(
                lambda: packed(self.backbone, rollouts, branches)[1],
                lambda: separate(self.backbone, rollouts, branches, Ways(left_padding=False))[1],
            )
        )

    def _trains(self) -> str | None:
        """A forward pass in training mode, and a backward pass, through rows as they are trained."""
        if self.small:
            longest = self.sample.rollouts[1:]
            gradients_of(lambda: rollout_hidden(self.backbone, longest), self.small)
            with training(self.model):
                rollout_hidden(self.backbone, longest)
        return None

    def _gradient_error(self, way: Callable[[], Tensor], truth: Callable[[], Tensor]) -> str | None:
        return gradient_error(self.backbone, way, truth, self.small) if self.trains and self.small else None

    def _shared_prefix(self) -> str | None:
        rollouts = self.sample.rollouts
        whole = prefill(self.backbone, rollouts)
        assert whole.prefix is not None
        kept = sum(t.numel() * t.element_size() for layer in whole.prefix for t in layer)
        self.cache_bytes = kept / rollouts.input_ids.numel()
        error = self.sample.error(whole.hidden, self.sample.response_states)
        return error or self._over(whole, rollouts, self.sample.branches, self.sample.window_states)

    def _over(self, whole: Prefill, rollouts: Rollouts, branches: Branches, truth: Tensor) -> str | None:
        """Decode the given windows over a prefix, and compare their states."""
        batch, slots, _ = branches.tokens.shape
        states: list[Tensor] = []

        def given(hidden: Tensor) -> Tensor:
            states.append(hidden.reshape(batch, slots, -1))
            return branches.tokens[:, :, len(states)].reshape(hidden.shape[:-1])

        rows = torch.arange(batch, device=truth.device).repeat_interleave(slots)
        tokens = branches.tokens.flatten(0, 1)
        decoder = Decoder(self.backbone, given, eos=rows.new_zeros(0))
        places = Places(rollouts, rows, branches.position.flatten())
        continue_over_prefix(decoder, whole, Start(tokens, torch.ones_like(rows)), places, share=False)
        return self.sample.error(torch.stack(states, dim=2), truth[:, :, 1:])

    def _sampled(self) -> str | None:
        """States, and windows over the prefix, that are kept from sampling."""
        ids, mask, response, states = generated(self.model, [self.sample.rollouts.prefix(row, 0) for row in range(2)])
        ones = torch.ones_like(response)
        rollouts = Rollouts(ids, mask, response, ones, ones)
        sampled = states.prefill(rollouts, keep_prefix=False)
        cached = states.prefill(rollouts, keep_prefix=True)
        self.cached_prefix = cached is not None and cached.is_like(prefill(self.backbone, rollouts))
        if sampled is None:
            return "generate does not feed one token at a time"
        row_states = [alone(self.backbone, rollouts.prefix(row, RESPONSE)) for row in range(2)]
        truth = torch.stack([states[p - 1 : -1] for states, p in zip(row_states, PROMPTS, strict=True)])
        return self.sample.error(sampled.hidden, truth)

    def _padded_tokens(self) -> str | None:
        return self._tokens_as_alone([0, 0], "padded prompts")

    def _batched_tokens(self) -> str | None:
        """Prompts of equal length: the first with some tokens of its rollout."""
        return self._tokens_as_alone([PROMPTS[1] - PROMPTS[0], 0], "prompts in a batch")

    def _tokens_as_alone(self, positions: list[int], kind: str) -> str | None:
        """`generate` must choose the tokens of each row that are the best where it is alone, but for rounding."""
        prompts = self._prompts(positions)
        for prompt, response in zip(prompts, generated(self.model, prompts)[2], strict=True):
            if self.sample.below_best(self.model, prompt, response) is not None:
                return f"generate continues {kind} differently than alone"
        return None

    def _prompts(self, positions: list[int]) -> list[Tensor]:
        """The rollouts up to these positions."""
        return [self.sample.rollouts.prefix(row, position) for row, position in enumerate(positions)]
