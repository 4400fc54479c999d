"""Windows from a transformers model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from topd.near_future.windows import Windows


class LocalModel:
    """Continues prefixes with `generate`, batched by length.

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
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self._decoding = sampling if temperature > 0 else {"do_sample": False}

    @torch.no_grad()
    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        device = next(self.model.parameters()).device
        tokens = torch.full((len(prefixes), length), self.pad_token_id, device=device)
        by_length = sorted(range(len(prefixes)), key=lambda index: len(prefixes[index]))
        for start in range(0, len(prefixes), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            new = self._generate([prefixes[index] for index in chosen], length)
            tokens[chosen, : new.shape[1]] = new
        return Windows(tokens, self._until_eos(tokens))

    def _generate(self, prefixes: list[Tensor], length: int) -> Tensor:
        longest = max(len(prefix) for prefix in prefixes)
        ids = torch.stack(
            [
                torch.nn.functional.pad(prefix, (longest - len(prefix), 0), value=self.pad_token_id)
                for prefix in prefixes
            ]
        ).to(next(self.model.parameters()).device)
        padding = torch.tensor([longest - len(prefix) for prefix in prefixes], device=ids.device)
        config = GenerationConfig(
            max_new_tokens=length,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            bos_token_id=None,
            disable_compile=True,
            **self._decoding,
        )
        mask = (torch.arange(longest, device=ids.device) >= padding[:, None]).long()
        output: Tensor = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return output[:, longest:]

    def _until_eos(self, tokens: Tensor) -> Tensor:
        """True up to and with the first EOS: what comes before was generated, whatever its id (pad may equal EOS)."""
        is_eos = torch.isin(tokens, torch.tensor(self.eos_token_ids, device=tokens.device))
        return is_eos.cumsum(-1) - is_eos.long() == 0
