"""Windows from a transformers model in this process: over the prefix it has read, or from prefixes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from topd.algorithm.head import at_least_float32
from topd.generation import own_settings_only
from topd.near_future.model_parts import backbone_of, output_head
from topd.near_future.padding import left_padded
from topd.near_future.shared_prefix import (
    Reading,
    candidate_start,
    continue_over_prefix,
    follow_rollout,
    sampled_start,
    until_eos,
)
from topd.near_future.ways import ways_of
from topd.near_future.windows import Rollouts, Windows


class LocalModel:
    """Continues prefixes: with `generate`, batched by length, or over what the model kept from reading the rollouts.

    Args:
        model: any causal language model of transformers.
        pad_token_id: id for padding.
        eos_token_ids: ids that end a window; the one that was generated is part of it.
        temperature: 0 decodes greedily (our choice, for both models); else samples from the full distribution.
        batch_size: prefixes that are decoded together.
    """

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        eos_token_ids: Sequence[int],
        temperature: float = 0.0,
        batch_size: int = 128,
    ) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.eos_token_ids = list(eos_token_ids)
        self.batch_size = batch_size
        self.temperature = temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self._decoding = sampling if temperature > 0 else {"do_sample": False}

    @torch.no_grad()
    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """Continue each prefix (token ids, 1-D) by at most `length` tokens, fewer only where EOS comes first."""
        device = next(self.model.parameters()).device
        tokens = torch.full((len(prefixes), length), self.pad_token_id, device=device)
        for chosen in self._batches([len(prefix) for prefix in prefixes], length):
            new = self._generate([prefixes[index] for index in chosen], length)
            tokens[chosen, : new.shape[1]] = new
        return Windows(tokens, until_eos(tokens, torch.tensor(self.eos_token_ids, device=device)))

    def _batches(self, lengths: list[int], growth: int) -> Iterator[list[int]]:
        """Numbers of the prefixes that are decoded together."""
        if not lengths:
            return
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        in_order = [lengths[index] for index in by_length]
        ways = ways_of(self.model)
        size = self.batch_size if ways.batches else 1
        for group in ways.together(in_order, [-n for n in in_order], growth):
            for start in range(0, len(group), size):
                yield [by_length[place] for place in group[start : start + size]]

    @torch.no_grad()
    def continue_over_prefix(
        self,
        rollouts: Rollouts,
        reading: Reading,
        greedy: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        from_candidate: bool = False,
    ) -> Windows:
        """The same windows as `continue_` gives for the prefixes at (row, position), all branches decoded together.

        Args:
            rollouts: that the prefixes are of.
            reading: what the model kept from reading them.
            greedy: [rollout, position] the model's most likely token at each position of the response.
            rows: [window] the rollout of each window.
            positions: [window] the response position at which it starts.
            length: tokens of each window at most.
            from_candidate: the windows begin with the rollout's own token.
        """
        if len(rows) == 0:
            return Windows(rows.new_zeros(0, length), rows.new_zeros(0, length, dtype=torch.bool))
        head = output_head(self.model)

        def next_token(hidden: Tensor) -> Tensor:
            states = hidden.flatten(0, -2)
            logits = states.new_empty(len(states), len(head.weight), dtype=at_least_float32(states))
            head.write_logits(states, logits)
            if self.temperature == 0:
                return logits.argmax(-1).view(hidden.shape[:-1])
            chosen = (logits / self.temperature).softmax(-1).multinomial(1)
            return chosen.view(hidden.shape[:-1])

        if from_candidate:
            start = candidate_start(rollouts, greedy if self.temperature == 0 else None, rows, positions, length)
        elif self.temperature == 0:
            start = follow_rollout(rollouts, greedy, rows, positions, length)
        else:
            start = sampled_start(reading, next_token, rows, positions, length)
        return continue_over_prefix(
            backbone_of(self.model), reading, start, next_token, rollouts, rows, positions,
            eos=torch.tensor(self.eos_token_ids, device=rows.device), share=self.temperature == 0,
        )  # fmt: skip

    def _generate(self, prefixes: list[Tensor], length: int) -> Tensor:
        device = next(self.model.parameters()).device
        ids, mask = (part.to(device) for part in left_padded(prefixes, self.pad_token_id))
        config = GenerationConfig(
            max_new_tokens=length,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            bos_token_id=None,
            disable_compile=True,
            **self._decoding,
        )
        with own_settings_only(self.model):
            output: Tensor = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return output[:, ids.shape[1] :]
