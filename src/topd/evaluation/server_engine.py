"""Responses from an OpenAI-compatible server (vLLM, SGLang)."""

from collections.abc import Iterator, Sequence
from typing import Any

from topd.errors import ServerError
from topd.evaluation.engines import SEED_STRIDE, Request, Response, Sampling
from topd.near_future.model_parts import NEUTRAL
from topd.teachers.openai_server import Limits, OpenAIServer, UnusableAnswer, refuse_unfinished

LIMITS = Limits(timeout=3600.0, concurrency=64)
"""With many parallel requests, a long response may take an hour."""


class ServerEngine:
    """Text prompts go to /v1/completions, messages to /v1/chat/completions.

    `url`: of the server, with or without /v1. `model`: the name under which the server serves it. `key_variable`:
    environment variable that holds the API key. `with_reasoning`: refuse text without its reasoning, which a server's
    reasoning parser removes. Raises `ServerError` if `url` is not a valid URL, or the variable holds no key.
    """

    together = 1

    def __init__(
        self, url: str, model: str, limits: Limits = LIMITS, key_variable: str | None = None,
        with_reasoning: bool = False,
    ) -> None:  # fmt: skip
        remedy = "Earlier responses are saved: fix the server or the request, and run the same command again to resume."
        self.model, self.with_reasoning = model, with_reasoning
        self.server = OpenAIServer(url, limits, remedy=remedy, key_variable=key_variable)

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Check that the server is reachable and serves the model."""
        served = self.server.models()
        if self.model not in served:
            raise ServerError(
                f"{self.server.url} does not serve {self.model!r}. It serves: "
                f"{self.server.shown(', '.join(served)) or 'nothing'}. Give one of these as the model, or start the "
                "server with that model."
            )

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """See `Engine`. Yields in the order of arrival. After a failure, requests in flight are completed and saved."""
        bodies = [self._body(request, sampling) for request in requests]
        for place, response in self.server.answers(bodies, self._response):
            yield [(requests[place].number, response)]

    def _body(self, request: Request, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        body: dict[str, Any] = NEUTRAL | {
            "model": self.model, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens, "seed": sampling.seed * SEED_STRIDE + request.number,
        }  # fmt: skip
        if isinstance(request.prompt, str):
            return "/v1/completions", body | {"prompt": request.prompt}
        if sampling.chat_template_kwargs:
            body["chat_template_kwargs"] = sampling.chat_template_kwargs
        return "/v1/chat/completions", body | {"messages": request.prompt}

    def _response(self, number: int, answer: Any) -> Response:
        choice = answer["choices"][0]
        message = choice if "text" in choice else choice["message"]
        refuse_unfinished(choice["finish_reason"])
        text = message["text"] if "text" in choice else message.get("content")
        apart = message.get("reasoning_content") or message.get("reasoning")
        if apart and (not text or self.with_reasoning):
            raise UnusableAnswer(
                "returns the reasoning separately from the text: serve the model without --reasoning-parser"
            )
        if text is None:
            raise UnusableAnswer("returns no text (null)")
        tokens = answer["usage"]["completion_tokens"]
        if not isinstance(text, str) or type(tokens) is not int or tokens < 0:
            raise TypeError
        return Response(text.encode(errors="replace").decode(), choice["finish_reason"] != "stop", tokens)
