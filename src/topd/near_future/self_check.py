"""Try every way of running a model on a few random tokens, and compare with the plain way.

Two prompts of different lengths with their rollouts, and two windows behind each. The truth is every sequence alone,
unpadded and without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from topd.near_future.branches import Branches, packed
from topd.near_future.limits import FAR, READ_EACH_TIME, Lengths, lengths_of
from topd.near_future.model_parts import backbone_of, evaluating, output_head
from topd.near_future.padding import last_states, left_padded
from topd.near_future.sampling_states import SamplingStates
from topd.near_future.shared_prefix import Reading, Start, continue_over_prefix, read
from topd.near_future.ways import ArchitectureError, Ways
from topd.near_future.windows import Rollouts

PROMPTS, RESPONSE, WINDOW = (4, 7), 10, 4
STARTS = ((5, 8), (2, 5))
"""Response positions of the windows: behind prefixes of the same lengths in both rollouts."""
LONGEST = max(PROMPTS) + RESPONSE
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest difference from the truth, as a share of how far states lie apart."""
FLOAT32_TOLERANCE = 1e-3
FAST = ("shared_prefix", "packed_rows", "sampling_states")
TRL = ("always", "without left padding", "never")


def check_model(model: Any) -> Ways:
    """Try all ways on a model that is held whole.

    Raises:
        ArchitectureError: the plain way is not that of a causal language model, or the head is not the model's.
    """
    inner = model.base_model.model if is_peft_model(model) else model
    lengths = lengths_of(inner)
    device_type = next(inner.parameters()).device.type
    plainly = evaluating(model), torch.autocast(device_type, enabled=False), own_generation_config(inner)
    with plainly[0], plainly[1], plainly[2], lengths.out_of_reach():
        check = Check(inner)
        ways = check.ways()
        if lengths.limits:
            ways = beyond_limits(check, lengths, ways)
    ends = [end for end in (ways.end, lengths.end) if end is not None]
    longest = min([*ends, lengths.switch or math.inf])
    bounded = {name: min(getattr(ways, name), longest) for name in FAST}
    kept = ways.cache_bytes if bounded["shared_prefix"] else 0.0
    return replace(ways, **bounded, switch=lengths.switch, end=min(ends, default=None), cache_bytes=kept)


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
    both = ways.left_padding and there.left_padding
    return replace(ways, **reach, left_padding=both, trl=max(ways.trl, there.trl, key=TRL.index), reasons=reasons)


@dataclass(frozen=True)
class Sample:
    """Random rollouts and windows, and the true states.

    Attributes:
        row_states: of each rollout alone [token, width], prompt included.
        window_states: [rollout, branch, window_position, width], that predict the windows' tokens.
        noise: how far the truth is from itself where another number of rows shares the batch.
    """

    rollouts: Rollouts
    branches: Branches
    row_states: list[Tensor]
    window_states: Tensor
    noise: float = 0.0

    @property
    def response_states(self) -> Tensor:
        """[rollout, position, width] the true states that predict the responses."""
        return torch.stack([states[p - 1 : -1] for states, p in zip(self.row_states, PROMPTS, strict=True)])

    def error(self, found: Tensor, truth: Tensor) -> str | None:
        """How far states are from the truth, in words; None if that is rounding."""
        difference = difference_of(found, truth)
        tolerance = max(TOLERANCE.get(truth.dtype, FLOAT32_TOLERANCE), 10 * self.noise)
        return None if difference <= tolerance else f"states differ by {difference:.2g} of their spread"


def difference_of(found: Tensor, truth: Tensor) -> float:
    """Distance as a share of how far states lie apart: the largest.

    In 16 bits, where rounding sends some tokens to other experts, it is the 80th percentile.
    """
    if found.shape != truth.shape:
        return math.inf
    low = truth.dtype in TOLERANCE
    found, truth = found.double().flatten(0, -2), truth.double().flatten(0, -2)
    spread = (truth - truth.mean(0)).norm(dim=-1).mean()
    distances = (found - truth).norm(dim=-1) / spread
    if not bool(distances.isfinite().all()):
        return math.inf
    return float(distances.quantile(0.8) if low else distances.max())


class Check:
    """The ways of one model, tried one after the other.

    Args:
        model: without a PEFT wrapper (its adapters stay in place).
    """

    def __init__(self, model: Any) -> None:
        self.model, self.backbone = model, backbone_of(model)
        self.reasons: dict[str, str] = {}
        self.cache_bytes = 0.0
        try:
            self.sample = sample_of(model, self.backbone)
        except Exception as error:
            raise ArchitectureError(
                f"{type(model).__name__} does not run on text alone ({_in_words(error)}). TOPD distils causal language "
                "models."
            ) from error

    def ways(self) -> Ways:
        self._stop_unless_causal()
        self._stop_unless_head()
        padded = self._try("left_padding", self._padded)
        sampled = self._try("sampling_states", self._sampled)
        if padded and not sampled:
            padded = self._try("left_padding", self._same_tokens_alone)
        return Ways(
            shared_prefix=math.inf if self._try("shared_prefix", self._shared_prefix) else 0,
            packed_rows=math.inf if self._try("packed_rows", self._packed_rows) else 0,
            sampling_states=math.inf if padded and sampled else 0,
            left_padding=padded,
            trl=self._trl(),
            cache_bytes=self.cache_bytes,
            reasons=self.reasons,
        )

    def _try(self, name: str, way: Callable[[], str | None]) -> bool:
        try:
            reason = way()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = _in_words(error)
        if reason is not None:
            self.reasons[name] = reason
        return reason is None

    def _stop_unless_causal(self) -> None:
        """The state before a window must not depend on what follows in the rollout."""
        ends = [
            states[[p + start - 1 for start in starts]]
            for states, p, starts in zip(self.sample.row_states, PROMPTS, STARTS, strict=True)
        ]
        error = self.sample.error(torch.stack(ends), self.sample.window_states[:, :, 0])
        if error is not None:
            raise ArchitectureError(
                f"{type(self.model).__name__} is not causal: its states change with the tokens that follow ({error}). "
                "If the architecture can decode, say so in its config (is_decoder=True)."
            )

    def _stop_unless_head(self) -> None:
        row = self.sample.rollouts.input_ids[1:]
        logits = self.model(input_ids=row).logits[0].float()
        try:
            found = output_head(self.model).logits(self.sample.row_states[1]).float()
            error = self.sample.error(found, logits)
        except Exception as failure:
            error = _in_words(failure)
        if error is not None:
            raise ArchitectureError(
                f"{type(self.model).__name__}: the output head on the last hidden states does not give the model's "
                f"logits ({error.replace('states', 'logits')}). TOPD reads a linear head with a bias, a scale and a "
                "soft cap; please report the model."
            )

    def _padded(self) -> str | None:
        rollouts = self.sample.rollouts
        states = last_states(self.backbone, rollouts.input_ids, rollouts.attention_mask)
        return self.sample.error(states[:, max(PROMPTS) - 1 : -1], self.sample.response_states)

    def _trl(self) -> Literal["always", "without left padding", "never"]:
        if self._try("trl", lambda: self._as_trl(self.sample.rollouts)):
            return "always"
        return "without left padding" if self._try("trl", lambda: self._as_trl(self.sample.rollouts[1:])) else "never"

    def _as_trl(self, rollouts: Rollouts) -> str | None:
        inputs = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask, "use_cache": False}
        states = self.model.base_model(**inputs).last_hidden_state[:, max(PROMPTS) - 1 : -1]
        return self.sample.error(states, self.sample.response_states[-len(states) :])

    def _packed_rows(self) -> str | None:
        flex = self.model.config._attn_implementation == "flex_attention"
        row, windows = packed(self.backbone, self.sample.rollouts, self.sample.branches, flex=flex)
        return self.sample.error(row, self.sample.response_states) or self.sample.error(
            windows, self.sample.window_states
        )

    def _shared_prefix(self) -> str | None:
        rollouts = self.sample.rollouts
        reading = read(self.backbone, rollouts)
        assert reading.prefix is not None
        kept = sum(t.numel() * t.element_size() for layer in reading.prefix for t in layer)
        self.cache_bytes = kept / rollouts.input_ids.numel()
        error = self.sample.error(reading.hidden, self.sample.response_states)
        return error or self._over(reading, rollouts, self.sample.branches, self.sample.window_states)

    def _over(self, reading: Reading, rollouts: Rollouts, branches: Branches, truth: Tensor) -> str | None:
        """Decode the given windows over a prefix, and compare their states."""
        batch, slots, _ = branches.tokens.shape
        states: list[Tensor] = []

        def given(hidden: Tensor) -> Tensor:
            states.append(hidden.reshape(batch, slots, -1))
            return branches.tokens[:, :, len(states)].reshape(hidden.shape[:-1])

        rows = torch.arange(batch, device=truth.device).repeat_interleave(slots)
        tokens = branches.tokens.flatten(0, 1)
        continue_over_prefix(
            self.backbone, self.model.config, reading, Start(tokens, torch.ones_like(rows)), given, rollouts, rows,
            branches.position.flatten(), eos=rows.new_zeros(0), share=False,
        )  # fmt: skip
        return self.sample.error(torch.stack(states, dim=2), truth[:, :, 1:])

    def _sampled(self) -> str | None:
        """States, and windows over the prefix, that are kept from sampling."""
        ids, mask, response, states = self._generated([0, 1])
        ones = torch.ones_like(response)
        rollouts = Rollouts(ids, mask, response, ones, ones)
        reading = states.reading(rollouts, keep_prefix=False)
        if reading is None:
            return "generate does not feed one token at a time"
        row_states = [alone(self.backbone, rollouts.prefix(row, RESPONSE)) for row in range(2)]
        truth = torch.stack([states[p - 1 : -1] for states, p in zip(row_states, PROMPTS, strict=True)])
        return self.sample.error(reading.hidden, truth)

    def _same_tokens_alone(self) -> str | None:
        together = self._generated([0, 1])[2]
        separately = torch.cat([self._generated([row])[2] for row in range(2)])
        return None if torch.equal(together, separately) else "generate continues padded prompts otherwise"

    def _generated(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, SamplingStates]:
        """Greedy responses: prompt ids and mask, responses, and what was kept."""
        ids, mask = left_padded([self.sample.rollouts.prefix(row, 0) for row in rows], padding_id(self.model))
        states = SamplingStates()
        with states.keeping(self.model):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=RESPONSE, do_sample=False, disable_compile=True,
                pad_token_id=padding_id(self.model),
            )  # fmt: skip
        return ids, mask, output[:, ids.shape[1] :], states


def sample_of(model: Any, backbone: nn.Module) -> Sample:
    """Random tokens, and every sequence alone."""
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ordinary = ordinary_tokens(model)

    def tokens(*shape: int) -> Tensor:
        return ordinary[torch.randint(len(ordinary), shape, generator=generator)].to(device)

    ids, mask = left_padded([tokens(length) for length in PROMPTS], padding_id(model))
    response, window = tokens(2, RESPONSE), tokens(2, 2, WINDOW)
    ones = torch.ones_like(response)
    rollouts = Rollouts(ids, mask, response, ones, ones)
    branches = Branches(torch.tensor(STARTS, device=device), window, torch.ones_like(window).bool())
    rows = [alone(backbone, rollouts.prefix(row, RESPONSE)) for row in range(2)]
    windows, noise = torch.empty(0), 0.0
    ends = [
        [torch.cat([rollouts.prefix(row, STARTS[row][slot]), window[row, slot, :-1]]) for row in range(2)]
        for slot in range(2)
    ]  # of the same length for each slot
    states = [last_states(backbone, torch.stack(pair), None)[:, -WINDOW:] for pair in ends]
    windows = torch.stack(states, dim=1)
    noise = difference_of(windows[:1, 0], alone(backbone, ends[0][0])[None, -WINDOW:])
    return Sample(rollouts, branches, rows, windows, noise)


def alone(backbone: nn.Module, ids: Tensor) -> Tensor:
    """[token, width] last hidden states of one sequence."""
    return last_states(backbone, ids[None], None)[0]


def ordinary_tokens(model: Any) -> Tensor:
    """Ids that have no special meaning to the model."""
    config = model.config.get_text_config()
    special = {padding_id(model)}
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    return torch.tensor([token for token in range(min(config.vocab_size, 2**16)) if token not in special])


def padding_id(model: Any) -> int:
    value = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if value is None or value < 0 else int(value)


@contextmanager
def own_generation_config(model: Any) -> Iterator[None]:
    """Generation without what the model's own configuration would add."""
    usual = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = usual


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
