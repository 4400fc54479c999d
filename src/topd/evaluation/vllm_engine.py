"""Responses from vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from topd.errors import TOPDError
from topd.evaluation.local_engine import check_context
from topd.evaluation.responses import SEED_STRIDE, Request, Response, Sampling, prompt_ids
from topd.near_future.generation import NEUTRAL


class VllmEngine:
    """vLLM batches by itself: `together` only says how many responses are kept at a time.

    vLLM gives each request its own random numbers, but its kernels may round otherwise in another batch: at a
    temperature, a response is then not always the same.

    Args:
        model: folder or Hub name.
        options: for `vllm.LLM`, such as tensor_parallel_size.

    Raises:
        TOPDError: vLLM is not installed.
    """

    def __init__(self, model: str, tokenizer: Any, config: Any, together: int = 256, **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise TOPDError(
                "--engine vllm needs the package vllm, on a machine that it supports: pip install 'topd[vllm]'. Or use "
                "--engine transformers, or a server elsewhere: --server URL."
            ) from error
        self.tokenizer, self.config, self.together = tokenizer, config, together
        self.llm = LLM(model=model, **options)

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The longest prompt and its response fit the context."""
        check_context(requests, sampling, self.tokenizer, self.config)

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`; in the order of the requests."""
        from vllm import SamplingParams

        for start in range(0, len(requests), self.together):
            batch = requests[start : start + self.together]
            prompts = [{"prompt_token_ids": prompt_ids(each.prompt, self.tokenizer, sampling)} for each in batch]
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
