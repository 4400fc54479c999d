"""Responses from an OpenAI-compatible server (vLLM, SGLang)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from topd.errors import ServerError
from topd.evaluation.responses import SEED_STRIDE, Request, Response, Sampling
from topd.generation import NEUTRAL
from topd.openai_server import Limits, OpenAIServer

LIMITS = Limits(timeout=3600.0, concurrency=64)
"""A long response may take an hour where many are under way."""


class ServerEngine:
    """Text prompts go to /v1/completions, messages to /v1/chat/completions.

    Args:
        url: of the server, with or without /v1.
        model: the name under which it serves the model.
    """

    together = 1

    def __init__(self, url: str, model: str, limits: Limits = LIMITS) -> None:
        remedy = (
            "What it answered before is kept: mend the server or the request, and run the same command again to go on."
        )
        self.model, self.server = model, OpenAIServer(url, limits, remedy=remedy)

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The server is there and serves the model."""
        served = self.server.models()
        if self.model not in served:
            raise ServerError(
                f"{self.server.url} does not serve {self.model!r}. It serves: {', '.join(served) or 'nothing'}. Give "
                "one of these as the model, or start the server with that model."
            )

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`, in the order of arrival. After a failure, what is under way is waited for and kept."""
        for place, answer in self.server.answers([self._body(request, sampling) for request in requests]):
            yield [(requests[place].number, self._response(answer))]

    def _body(self, request: Request, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        body: dict[str, Any] = NEUTRAL | {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed * SEED_STRIDE + request.number,
        }
        if isinstance(request.prompt, str):
            return "/v1/completions", body | {"prompt": request.prompt}
        if sampling.chat_template_kwargs:
            body["chat_template_kwargs"] = sampling.chat_template_kwargs
        return "/v1/chat/completions", body | {"messages": request.prompt}

    def _response(self, answer: Any) -> Response:
        try:
            choice = answer["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            tokens = int(answer["usage"]["completion_tokens"])
            return Response(text or "", choice["finish_reason"] != "stop", tokens)
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.server.url} answered in a form that is not OpenAI's: {str(answer)[:200]}. Is it an "
                "OpenAI-compatible server?"
            ) from error
