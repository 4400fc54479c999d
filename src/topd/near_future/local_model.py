"""Windows from a transformers model in this process: over the prefix it has read, or from prefixes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from topd.algorithm.vocabulary import at_least_float32
from topd.near_future.generation import own_settings_only
from topd.near_future.model_parts import backbone_of, output_head
from topd.near_future.padding import left_padded
from topd.near_future.shared_prefix import Prefill, candidate_start, continue_over_prefix, follow_rollout, until_eos
from topd.near_future.ways import ways_of
from topd.near_future.windows import Places, Windows


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
        self, places: Places, length: int, prefill: Prefill, from_candidate: bool = False
    ) -> Windows:
        """The greedy windows that `continue_` gives for the prefixes at the places, all branches decoded together.

        `prefill`: of the rollouts, with `prefix` and `greedy`. `from_candidate`: the windows begin with the rollout's
        own token.
        """
        if len(places) == 0:
            nothing = places.rows.new_zeros(0, length)
            return Windows(nothing, nothing.bool())
        assert prefill.greedy is not None
        head = output_head(self.model)

        def next_token(hidden: Tensor) -> Tensor:
            states = hidden.flatten(0, -2)
            logits = states.new_empty(len(states), len(head.weight), dtype=at_least_float32(states))
            return head.write_logits(states, logits).argmax(-1).view(hidden.shape[:-1])

        start = (candidate_start if from_candidate else follow_rollout)(places, prefill.greedy, length)
        ends = torch.tensor(self.eos_token_ids, device=places.rows.device)
        return continue_over_prefix(backbone_of(self.model), prefill, start, next_token, places, ends)

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
