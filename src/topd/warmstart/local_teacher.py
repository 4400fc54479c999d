"""Responses from a transformers model in this process, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topd.near_future.local_model import LocalModel
from topd.near_future.sampling import encode
from topd.training.tokenizers import check_context
from topd.warmstart.responses import Request, Response, Sampling


class LocalTeacher:
    """Generates with `generate`, padded on the left.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        together: prompts that are decoded together.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, together: int) -> None:
        self.model, self.tokenizer, self.together = model, tokenizer, together

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The longest prompt and its response fit the context."""
        longest = max((self._ids(request.prompt, sampling) for request in requests), key=len)
        text = str(self.tokenizer.decode(longest))
        check_context(len(longest), text, sampling.max_new_tokens, 0, {"teacher": self.model.config})

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Teacher`. The random numbers of a batch depend on the seed and on its first number alone."""
        eos = self._eos_token_ids()
        pad = eos[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        source = LocalModel(self.model, pad, eos, sampling.temperature, self.together, sampling.top_p)
        for start in range(0, len(requests), self.together):
            batch = requests[start : start + self.together]
            prompts = [self._ids(request.prompt, sampling) for request in batch]
            torch.manual_seed(sampling.seed * 1_000_003 + batch[0].number)
            output = source.continue_(prompts, sampling.max_new_tokens)
            rows = [tokens[mask] for tokens, mask in zip(output.tokens, output.mask, strict=True)]
            yield [(request.number, self._response(row, eos)) for request, row in zip(batch, rows, strict=True)]

    def _ids(self, prompt: Any, sampling: Sampling) -> torch.Tensor:
        return torch.tensor(encode(prompt, self.tokenizer, **(sampling.chat_template_kwargs or {})))

    def _eos_token_ids(self) -> list[int]:
        """Every token that ends a response: the tokenizer's, and those of the generation config (chat models)."""
        configured = self.model.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        return [token for token in dict.fromkeys([self.tokenizer.eos_token_id, *more]) if token is not None]

    def _response(self, tokens: torch.Tensor, eos: list[int]) -> Response:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Response(str(text), int(tokens[-1]) not in eos, len(tokens))
