"""What responds to prompts: the protocol, and engines that run a model in this process (transformers, vLLM)."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from topd.errors import NonFiniteError, TOPDError, install
from topd.loading import tokenizers
from topd.loading.prompts import prompt_ids
from topd.near_future.fast_decoding import fast_decoding
from topd.near_future.model_parts import (
    NEUTRAL,
    end_token_ids,
    grouped,
    left_padded,
    own_settings_only,
    padding_id,
)
from topd.near_future.sampling import generate_compactly
from topd.near_future.self_check import batching_of

SEED_STRIDE = 1_000_003
"""The seed of a response is `seed * SEED_STRIDE + number`."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    The first three defaults are our choice: the paper gives values for the warm start's teacher only.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        max_new_tokens: length limit of a response; a longer one is truncated and marked.
        seed: of the whole run; every response has its own random numbers.
        chat_template_kwargs: such as {"enable_thinking": False}.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 16384
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """A requested response.

    Attributes:
        number: with the seed, it fixes the response's random numbers.
        prompt: text or messages.
    """

    number: int
    prompt: Any


@dataclass(frozen=True)
class Response:
    """The text that the model generated, without special tokens.

    Attributes:
        truncated: whether the length limit, not the model, ended it.
        tokens: its number of tokens, including the end token.
    """

    text: str
    truncated: bool
    tokens: int


class Engine(Protocol):
    """Responds to prompts. Yields and saves `together` responses at a time."""

    together: int

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Raise `TOPDError` if it is known in advance that it cannot respond."""

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """Yield the responses of all requests, with their numbers, as they are ready."""


def ids_of(request: Request, tokenizer: Any, sampling: Sampling) -> list[int]:
    """Token ids of a request's prompt."""
    return prompt_ids(tokenizer, request.prompt, sampling.chat_template_kwargs)


def as_chat(prompt: Any, chat: bool) -> Any:
    """With `chat`, a text prompt as a user message; other prompts unchanged."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


class LocalEngine:
    """A transformers model in this process. Each response has its own random numbers, independent of its batch.

    `model`: any causal language model, in evaluation mode. `together`: number of prompts decoded together.
    `limited_by`: the user's option for the limit on new tokens, for messages.
    """

    def __init__(self, model: Any, tokenizer: Any, together: int = 32, limited_by: str = "--max-new-tokens") -> None:
        self.model, self.tokenizer, self.together, self.limited_by = model, tokenizer, together, limited_by
        self.eos = end_token_ids(model.generation_config, tokenizer)
        self._batching = cache(partial(batching_of, model))  # tried once per length
        self._leaving = False

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Check that the longest prompt and its response fit the context."""
        check_context(requests, sampling, self.tokenizer, self.model.config, self.limited_by)

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`. Yields the responses to long prompts first, or by length where padding changes responses."""
        for batch in self._batches(requests, sampling):
            rows = self._generate(batch, sampling)
            yield [(request.number, self._response(row)) for request, row in zip(batch, rows, strict=True)]

    def _batches(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Request]]:
        """Requests that are decoded together: of similar length, so that little is padding.

        Of equal length, or one at a time, where a batch changes responses.
        """
        lengths = [len(ids_of(request, self.tokenizer, sampling)) for request in requests]
        groups, size = [sorted(range(len(requests)), key=lengths.__getitem__, reverse=True)], self.together
        if size > 1 and len(requests) > 1:
            batching = self._batching(max(lengths) + sampling.max_new_tokens)
            self._leaving = batching.leaving
            if not batching.left_padding:
                groups = grouped(lengths)
                size = size if batching.batches else 1
                how = "prompts of equal length together" if batching.batches else "one prompt at a time"
                warnings.warn(
                    f"{type(self.model).__name__} answers {how}, which is slower: in a padded batch its responses "
                    f"would change ({batching.reasons['left_padding' if batching.batches else 'batches']}).",
                    stacklevel=3,
                )
        for group in groups:
            for start in range(0, len(group), size):
                yield [requests[index] for index in group[start : start + size]]

    @torch.no_grad()  # not inference_mode: training may continue with what the model caches here
    def _generate(self, batch: Sequence[Request], sampling: Sampling) -> Tensor:
        """[response, token] new tokens."""
        prompts = [torch.tensor(ids_of(request, self.tokenizer, sampling), dtype=torch.long) for request in batch]
        pad = padding_id(self.tokenizer)
        ids, mask = (each.to(self.model.device) for each in left_padded(prompts, pad))
        longest = ids.shape[1]
        config = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, pad_token_id=pad, eos_token_id=self.eos or None,
            bos_token_id=None, disable_compile=True,
        )  # fmt: skip
        chooser = [] if sampling.temperature == 0 else [OwnRandomNumbers(batch, sampling, longest)]
        watch = NanWatch()
        compactly = self._leaving and len(batch) > 1 and bool(self.eos)
        generate = partial(generate_compactly, self.model.generate, chooser) if compactly else self.model.generate
        with own_settings_only(self.model), fast_decoding(self.model):
            output: Tensor = generate(
                input_ids=ids, attention_mask=mask, generation_config=config,
                logits_processor=LogitsProcessorList([watch, *chooser]),
            )  # fmt: skip
        if bool(watch.found):
            raise NonFiniteError(
                f"The logits of {self.model.config._name_or_path or 'the model'} are NaN. Its weights are broken (NaN "
                "or infinity), or its dtype is too small: try --dtype float32 or bfloat16."
            )
        return output[:, longest:].cpu()

    def _response(self, row: Tensor) -> Response:
        ends = torch.isin(row, torch.tensor(self.eos)).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(row)
        text = self.tokenizer.decode(row[:count], skip_special_tokens=True)
        return Response(str(text), truncated=not len(ends), tokens=count)


class NanWatch(LogitsProcessor):
    """Whether any logit was NaN, from which no sensible token can be chosen. The host need not wait for it."""

    found: bool | Tensor = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found = scores.isnan().any() | self.found
        return scores


class OwnRandomNumbers(LogitsProcessor):
    """Samples each row by inverting its cumulative distribution at the row's own uniform random number.

    `generate` draws all rows of a batch from one generator, which makes a row depend on the other rows.
    """

    def __init__(self, batch: Sequence[Request], sampling: Sampling, prompt_length: int) -> None:
        draws = [
            numpy.random.default_rng([sampling.seed, request.number]).random(sampling.max_new_tokens)
            for request in batch
        ]
        self.uniform = torch.tensor(numpy.stack(draws, axis=1))  # [step, row]
        self.rows = torch.arange(len(batch))  # of the batch that are left in it
        self.temperature, self.prompt_length = sampling.temperature, prompt_length
        self.top_p = sampling.top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[row, vocabulary] logits -> 0 at the chosen token, -inf elsewhere."""
        logits = nucleus(scores.float() / self.temperature, self.top_p)
        below = logits.softmax(-1).double().cumsum(-1)
        uniform = self.uniform[input_ids.shape[1] - self.prompt_length, self.rows.cpu()].to(below.device)
        chosen = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.clamp(max=scores.shape[1] - 1), 0.0)


SORTED = 256
"""A nucleus is searched for among this many most likely tokens first; to sort the whole vocabulary is slow on a CPU."""


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """[row, vocabulary] logits -> -inf outside of the most likely tokens whose probabilities reach `top_p` together."""
    if top_p >= 1:
        return logits
    first, tokens = logits.topk(min(SORTED, logits.shape[1]))
    shares = (first - logits.logsumexp(-1, keepdim=True)).double().exp()
    before = shares.cumsum(-1) - shares
    if logits.shape[1] > SORTED and bool((before[:, -1] < top_p).any()):
        found: Tensor = TopPLogitsWarper(top_p)(None, logits)  # type: ignore[arg-type]  # which it does not read
        return found
    return torch.full_like(logits, -torch.inf).scatter(1, tokens, first.masked_fill(before >= top_p, -torch.inf))


def check_context(
    requests: Sequence[Request], sampling: Sampling, tokenizer: Any, config: Any, limited_by: str = "--max-new-tokens"
) -> None:
    """Raise `ContextError` if the longest prompt and its response do not fit the model's context."""
    longest = max((ids_of(request, tokenizer, sampling) for request in requests), key=len)
    tokenizers.check_context(
        len(longest), tokenizer.decode(longest), sampling.max_new_tokens, 0, {"model": config}, limited_by
    )


class VllmEngine:
    """vLLM in this process. vLLM batches itself: `together` is only how many responses are saved at a time.

    vLLM gives each request its own random numbers, but its kernels may round differently in another batch, so sampled
    responses are not always reproducible. `model`: folder or Hub name. `options`: for `vllm.LLM`, such as
    tensor_parallel_size. Raises `TOPDError` if vLLM is not installed.
    """

    def __init__(self, model: str, tokenizer: Any, config: Any, together: int = 256, **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise TOPDError(
                f"--engine vllm needs the package vllm, on a machine that it supports: {install('vllm')}. Or use "
                "--engine transformers, or a server elsewhere: --server URL."
            ) from error
        self.tokenizer, self.config, self.together = tokenizer, config, together
        self.llm = LLM(model=model, **options)

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Check that the longest prompt and its response fit the context."""
        check_context(requests, sampling, self.tokenizer, self.config)

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`. Yields in the order of the requests."""
        from vllm import SamplingParams

        for start in range(0, len(requests), self.together):
            batch = requests[start : start + self.together]
            prompts = [{"prompt_token_ids": ids_of(each, self.tokenizer, sampling)} for each in batch]
            params = [
                SamplingParams(
                    **NEUTRAL, temperature=sampling.temperature, top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens, seed=sampling.seed * SEED_STRIDE + each.number,
                )
                for each in batch
            ]  # fmt: skip
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            yield [
                (each.number, Response(one.text, one.finish_reason != "stop", len(one.token_ids)))
                for each, one in zip(batch, (output.outputs[0] for output in outputs), strict=True)
            ]
