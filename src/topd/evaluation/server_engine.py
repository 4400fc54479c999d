"""Responses from an OpenAI-compatible server (vLLM, SGLang): bounded concurrency, retries with backoff."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx2

from topd.errors import TOPDError
from topd.evaluation.responses import SEED_STRIDE, Request, Response, Sampling

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may pass: time-outs, too many requests, a server that starts or restarts."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, at most."""


class ServerEngine:
    """Text prompts go to /v1/completions, messages to /v1/chat/completions.

    Args:
        url: of the server, with or without /v1.
        model: the name under which it serves the model.
        concurrency: requests under way at a time.
        retries: of a request that fails in a way that may pass.
        timeout: seconds for one response.
        sleep: waits; tests replace it.
    """

    together = 1

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int = 64,
        retries: int = 8,
        timeout: float = 3600.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model, self.concurrency, self.retries, self.sleep = model, concurrency, retries, sleep
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self.client = httpx2.Client(timeout=httpx2.Timeout(timeout, connect=30.0), limits=limits)

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The server is there and serves the model."""
        served = [model["id"] for model in self._call("GET", "models").get("data", [])]
        if self.model not in served:
            raise TOPDError(
                f"{self.url} does not serve {self.model!r}. It serves: {', '.join(served) or 'nothing'}. Give one of "
                "these as the model, or start the server with that model."
            )

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`, in the order of arrival. After a failure, what is under way is waited for and kept."""
        pool, failure = ThreadPoolExecutor(self.concurrency), None
        futures = {pool.submit(self._respond, request, sampling): request.number for request in requests}
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    yield [(futures[future], future.result())]
                elif failure is None:
                    failure = error
                    for other in futures:
                        other.cancel()
        except BaseException:  # interrupted: do not wait for an hour
            self.client.close()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _respond(self, request: Request, sampling: Sampling) -> Response:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,  # none, whatever the model's generation config says
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed * SEED_STRIDE + request.number,
        }
        if isinstance(request.prompt, str):
            answer = self._call("POST", "completions", body | {"prompt": request.prompt})
        else:
            body["messages"] = request.prompt
            if sampling.chat_template_kwargs:
                body["chat_template_kwargs"] = sampling.chat_template_kwargs
            answer = self._call("POST", "chat/completions", body)
        try:
            choice = answer["choices"][0]
            text = choice["text"] if isinstance(request.prompt, str) else choice["message"]["content"]
            tokens = int(answer["usage"]["completion_tokens"])
            return Response(text or "", choice["finish_reason"] != "stop", tokens)
        except (KeyError, IndexError, TypeError) as error:
            raise TOPDError(f"{self.url} answered in a form that is not OpenAI's: {str(answer)[:200]}.") from error

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer, after as many tries as it takes."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self.sleep(min(LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))
            try:
                answer = self.client.request(method, f"{self.url}/{path}", json=body)
                if answer.is_success:
                    return answer.json()
                problem = f"status {answer.status_code}: {answer.text[:300]}"
                if answer.status_code not in RETRIED:
                    break
            except (httpx2.TransportError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise TOPDError(
            f"{self.url}/{path} failed ({problem}). What it answered before is kept: mend the server or the request, "
            "and run the same command again to go on."
        )
