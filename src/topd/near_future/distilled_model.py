"""Student and teacher as the step sees them: hidden states, an output head, embeddings, and continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from topd.algorithm import Head
from topd.near_future.branches import Branches, ends_of, hidden_with_branches, rollout_hidden
from topd.near_future.local_model import LocalModel
from topd.near_future.model_parts import backbone_of, evaluating, output_head, whole
from topd.near_future.sampling_states import SamplingStates
from topd.near_future.shared_prefix import Reading, read
from topd.near_future.sources import ContinuesPrefixes
from topd.near_future.ways import Ways, ways_of
from topd.near_future.windows import Rollouts, Windows

Forward = Callable[..., Any]
"""Runs `function(*args)` inside the wrapped model's forward, so that DDP, FSDP or DeepSpeed see it."""


class DistilledModel:
    """One of the two models.

    Args:
        model: the unwrapped causal language model of transformers (a PEFT model is fine).
        source: continues prefixes; a context manager factory, since a trained model is unwrapped for generation.
        forward: see `Forward`.
        temperature: of the token loss, as in TRL.
        micro_batch: rollouts that are scored together.
        share_prefix: decode all windows of a rollout over one copy of it, where the model can.
    """

    def __init__(
        self,
        model: Any,
        source: Callable[[], AbstractContextManager[ContinuesPrefixes]],
        forward: Forward = lambda function, *args: function(*args),
        temperature: float = 1.0,
        micro_batch: int = 8,
        share_prefix: bool = True,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.share_prefix = share_prefix
        self._source, self._forward, self._micro_batch = source, forward, micro_batch

    @property
    def backbone(self) -> nn.Module:
        """The decoder without its output head."""
        return backbone_of(self.model)

    @property
    def ways(self) -> Ways:
        """What is exact for the model, see `ways_of`."""
        return ways_of(self.model)

    def shares_prefix(self, rollouts: Rollouts, window_length: int = 0) -> bool:
        """Whether windows may be decoded over one copy of each rollout."""
        return self.share_prefix and rollouts.input_ids.shape[1] + window_length <= self.ways.shared_prefix

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes that a kept prefix takes; 0 where none is kept."""
        return self.ways.cache_bytes if self.share_prefix else 0.0

    @property
    def eos_token_ids(self) -> list[int]:
        """Token ids that end a window."""
        with self._source() as source:
            return source.eos_token_ids

    def head(self) -> Head:
        """The output head, whole also where FSDP2 has sharded it."""
        return output_head(self.model, self.temperature)

    def embeddings(self) -> Tensor:
        """[vocabulary, width] static input embeddings."""
        return whole(self.model.get_input_embeddings().weight).detach()

    @torch.no_grad()
    def hidden(self, rollouts: Rollouts) -> Tensor:
        """[rollout, position, width]: the states that predict each response token, in evaluation mode, no gradient."""
        with evaluating(self.model):
            return torch.cat(
                [
                    self._forward(rollout_hidden, self.backbone, rollouts[start : start + self._micro_batch], self.ways)
                    for start in range(0, len(rollouts), self._micro_batch)
                ]
            )

    @torch.no_grad()
    def read(self, rollouts: Rollouts, keep_prefix: bool = True) -> Reading:
        """Read rollouts, in evaluation mode; unless told otherwise in one forward pass that keeps keys and values."""
        if not (keep_prefix and self.shares_prefix(rollouts)):
            return Reading(self.hidden(rollouts))
        with evaluating(self.model):
            reading: Reading = self._forward(read, self.backbone, rollouts)
        return reading

    def sampled(self, rollouts: Rollouts, states: SamplingStates | None, keep_prefix: bool) -> Reading | None:
        """What sampling these rollouts computed, where that equals reading them; else None."""
        if states is None or rollouts.input_ids.shape[1] > self.ways.sampling_states:
            return None
        keep_prefix = keep_prefix and self.shares_prefix(rollouts)
        if keep_prefix and not self.ways.cached_prefix:
            return None
        return states.reading(rollouts, keep_prefix)

    def hidden_and_windows(
        self, rollouts: Rollouts, branches: Branches | None, from_rollout: bool = False
    ) -> tuple[Tensor, Tensor]:
        """States that predict the response tokens, and those that predict the windows' tokens, with gradients.

        With `from_rollout`, the windows are the rollout's own tokens, whose states the row already holds.
        """
        if branches is None:
            return rollout_hidden(self.backbone, rollouts, self.ways), torch.empty(0)
        if not from_rollout:
            return hidden_with_branches(self.model, self.backbone, rollouts, branches, self.ways)
        hidden = rollout_hidden(self.backbone, rollouts, self.ways)
        length = branches.tokens.shape[-1]
        index = branches.position[:, :, None] + torch.arange(length, device=hidden.device)
        row = torch.arange(len(rollouts), device=hidden.device)[:, None, None]
        return hidden, hidden[row, index.clamp(max=hidden.shape[1] - 1)]

    @torch.no_grad()
    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        """[rollout, branch, window_position, width]: the states that predict the windows' tokens, no gradient."""
        with evaluating(self.model):
            parts = []
            for start in range(0, len(rollouts), self._micro_batch):
                rows = slice(start, start + self._micro_batch)
                inputs = self.model, self.backbone, rollouts[rows], branches[rows], self.ways
                parts.append(self._forward(hidden_with_branches, *inputs)[1])
        return torch.cat(parts)

    @torch.no_grad()
    def states_of(self, prefixes: Sequence[Tensor], windows: Windows) -> Tensor:
        """[window, window_position, width]: last hidden states at the window tokens themselves."""
        if len(windows) == 0:
            return self.embeddings().new_zeros(*windows.tokens.shape, self.embeddings().shape[1])
        ids = [
            torch.cat([prefix, tokens]) for prefix, tokens in zip(prefixes, windows.tokens, strict=True)
        ]  # padding after EOS is never looked at
        length, states = windows.tokens.shape[1], []
        with evaluating(self.model):
            for start in range(0, len(ids), self._micro_batch):
                rows = ids[start : start + self._micro_batch]
                states.append(self._forward(ends_of, self.backbone, rows, length, self.ways))
        return torch.cat(states)

    @torch.no_grad()
    def continue_(
        self,
        rollouts: Rollouts,
        reading: Reading,
        greedy: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        from_candidate: bool = False,
    ) -> Windows:
        """The model's own near future from each place in the rollouts, in evaluation mode.

        Args:
            rollouts: that the windows branch off.
            reading: what the model kept from reading them.
            greedy: [rollout, position] its most likely token at each position of the responses.
            rows: [window] the rollout of each window.
            positions: [window] the response position at which it starts.
            length: tokens of each window at most.
            from_candidate: the windows begin with the rollout's own token; what follows is the model's.
        """
        with evaluating(self.model), self._source() as source:
            over_prefix = reading.prefix is not None and self.shares_prefix(rollouts, length)
            if over_prefix and isinstance(source, LocalModel):
                return source.continue_over_prefix(rollouts, reading, greedy, rows, positions, length, from_candidate)
            if not from_candidate:
                return source.continue_(rollouts.prefixes(rows, positions), length)
            candidate = rollouts.response_ids[rows, positions][:, None]
            present = torch.ones_like(candidate, dtype=torch.bool)
            if length == 1:
                return Windows(candidate, present)
            after = source.continue_(rollouts.prefixes(rows, positions + 1), length - 1)
            ended = torch.isin(candidate, torch.tensor(source.eos_token_ids, device=candidate.device))
            mask = torch.cat([present, after.mask & ~ended], 1)
            return Windows(torch.cat([candidate, after.tokens], 1) * mask, mask)


def fixed(source: ContinuesPrefixes) -> Callable[[], AbstractContextManager[ContinuesPrefixes]]:
    """A source that needs no unwrapping."""
    return lambda: nullcontext(source)
