"""Responses from a transformers model in this process. Each has its own random numbers, whatever it is batched with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from topd.errors import ContextError
from topd.evaluation.responses import Request, Response, Sampling, prompt_ids
from topd.generation import end_token_ids, own_settings_only, padding_id
from topd.near_future.padded_prompts import batching_of
from topd.near_future.padding import grouped


class LocalEngine:
    """Generates with `generate`, padded on the left; otherwise where that changes responses.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        together: prompts that are decoded together.
        limited_by: what the user calls the limit on new tokens, for messages.
    """

    def __init__(self, model: Any, tokenizer: Any, together: int = 32, limited_by: str = "--max-new-tokens") -> None:
        self.model, self.tokenizer, self.together, self.limited_by = model, tokenizer, together, limited_by
        self.eos = end_token_ids(model.generation_config, tokenizer)

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The longest prompt and its response fit the context."""
        check_context(requests, sampling, self.tokenizer, self.model.config, self.limited_by)

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`; in the order of the requests, or by length where padding changes responses."""
        for batch in self._batches(requests, sampling):
            rows = self._generate(batch, sampling)
            yield [(request.number, self._response(row)) for request, row in zip(batch, rows, strict=True)]

    def _batches(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Request]]:
        """Requests that are decoded together."""
        lengths = [len(prompt_ids(request.prompt, self.tokenizer, sampling)) for request in requests]
        groups, size = [list(range(len(requests)))], self.together
        if size > 1 and len(requests) > 1:
            batching = batching_of(self.model, max(lengths) + sampling.max_new_tokens)
            if not batching.padded:
                groups = grouped(lengths)
                size = size if batching.equal else 1
                how = "prompts of equal length together" if batching.equal else "one prompt at a time"
                warnings.warn(
                    f"{type(self.model).__name__} answers {how}, which takes longer: in a padded batch its responses "
                    f"would change ({batching.reason}).",
                    stacklevel=3,
                )
        for group in groups:
            for start in range(0, len(group), size):
                yield [requests[index] for index in group[start : start + size]]

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Request], sampling: Sampling) -> Tensor:
        """[response, token] new tokens."""
        prompts = [prompt_ids(request.prompt, self.tokenizer, sampling) for request in batch]
        pad = padding_id(self.tokenizer)
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, pad_token_id=pad, eos_token_id=self.eos or None,
            bos_token_id=None, disable_compile=True,
        )  # fmt: skip
        chooser = [] if sampling.temperature == 0 else [OwnRandomNumbers(batch, sampling, longest)]
        with own_settings_only(self.model):
            output: Tensor = self.model.generate(
                input_ids=ids, attention_mask=mask.to(ids.device), generation_config=config,
                logits_processor=LogitsProcessorList(chooser),
            )  # fmt: skip
        return output[:, longest:].cpu()

    def _response(self, row: Tensor) -> Response:
        ends = torch.isin(row, torch.tensor(self.eos)).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(row)
        text = self.tokenizer.decode(row[:count], skip_special_tokens=True)
        return Response(str(text), truncated=not len(ends), tokens=count)


class OwnRandomNumbers(LogitsProcessor):
    """Samples: leaves each row the token at which its distribution function passes a uniform number of the row's own.

    `generate` draws all rows of a batch from one generator, so that a row depends on the rows beside it.
    """

    def __init__(self, batch: Sequence[Request], sampling: Sampling, prompt_length: int) -> None:
        draws = [
            numpy.random.default_rng([sampling.seed, request.number]).random(sampling.max_new_tokens)
            for request in batch
        ]
        self.uniform = torch.tensor(numpy.stack(draws, axis=1))  # [step, row]
        self.temperature, self.prompt_length = sampling.temperature, prompt_length
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[row, vocabulary] logits -> 0 at the chosen token, -inf elsewhere."""
        logits = scores.float() / self.temperature
        if self.top_p is not None:
            logits = self.top_p(input_ids, logits)
        below = logits.softmax(-1).double().cumsum(-1)
        uniform = self.uniform[input_ids.shape[1] - self.prompt_length].to(below.device)
        chosen = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.clamp(max=scores.shape[1] - 1), 0.0)


def check_context(
    requests: Sequence[Request], sampling: Sampling, tokenizer: Any, config: Any, limited_by: str = "--max-new-tokens"
) -> None:
    """Raise `ContextError` if the longest prompt and its response do not fit the model's context."""
    longest = max(len(prompt_ids(request.prompt, tokenizer, sampling)) for request in requests)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        room = limit - longest
        remedy = f"Give at most {limited_by} {room}." if room > 0 else "Leave that prompt out, or shorten it."
        raise ContextError(
            f"The longest prompt has {longest} tokens; with {limited_by} {sampling.max_new_tokens} that is more than "
            f"the model's context of {limit}. {remedy}"
        )
