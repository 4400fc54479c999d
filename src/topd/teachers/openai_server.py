"""One OpenAI-compatible server over HTTP: many requests at a time, a deadline for each, retries while it fails.

Requests run in an event loop of their own thread, so that a deadline or an interruption ends them wherever they are:
while they connect, while the server sends nothing, and while it sends one byte per second.
"""

from __future__ import annotations

import json
import logging
import random
import re
import reprlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from topd.errors import ServerError
from topd.teachers.server_address import HIDDEN, parse_address
from topd.visible import visible

logger = logging.getLogger(__name__)

TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which a request is sent again: time-outs, too many requests, a server that starts or restarts."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, doubled before each later one, up to the longest; each is shortened at random."""
CONNECTING, ASKING = 5.0, 10.0
"""Most seconds for a connection, and for an answer to a question about the server itself."""
FIRST_CONTACT = 5.0
"""Patience, in seconds, with a server that has never answered: its address is probably wrong."""
BETWEEN_MESSAGES = 10.0
TRIES = 5
"""How often a request is sent whose answers cannot be used, such as one that the server aborted."""
MOST_BYTES = 256 * 2**20
"""Size of an answer after decompression. 32,000 tokens with 20 log-probabilities each take about 50 MB."""
LISTENING = 0.1
"""Seconds between two looks at whether waiting is to end."""

_REPR = reprlib.Repr()  # a few entries of what a server sent, however large or deep it is
_REPR.maxstring = _REPR.maxother = 200

Read = Callable[[int, Any], Any]
"""Takes what is needed out of an answer, given the number of its request and the parsed JSON. It raises
`UnusableAnswer` or `ServerError`; errors of looking things up (`KeyError`, `TypeError` ...) become a `ServerError`."""


def _as_it_is(number: int, answer: Any) -> Any:
    return answer


class UnusableAnswer(Exception):
    """The server answered, but not with what was asked for; another try may help. The text says what it did instead."""


class TemporaryFailure(Exception):
    """The server says that it cannot answer now."""


class WaitingStopped(Exception):
    """The answers are not wanted any more: see `OpenAIServer.stopped`."""


@dataclass(frozen=True)
class Limits:
    """What is asked of a server, and how long it is waited for.

    Attributes:
        timeout: seconds for one request, from connecting to the last byte of the answer.
        patience: seconds without any answer since the first failure, after which a server is given up.
        concurrency: requests at a time, from this process.
    """

    timeout: float = 300.0
    patience: float = 600.0
    concurrency: int = 16


class OpenAIServer:
    """JSON in, JSON out.

    `url`: with or without `/v1`; it may hold a user and password, or keys in its query (the attribute has none).
    `name`: of the server, for messages; with the URL it is the attribute `named`. `remedy`: what to do when it refuses
    a request or is given up, for messages. `key_variable`: environment variable that holds the API key. Raises
    `ServerError`: see `parse_address`.
    """

    def __init__(
        self, url: str, limits: Limits = Limits(), name: str = "The server", remedy: str = "Fix or restart it.",
        key_variable: str | None = None,
    ) -> None:  # fmt: skip
        self._address = parse_address(url, name, key_variable)
        self.url = self._address.url
        self.limits, self.named, self._remedy = limits, f"{name} at {self.url}", remedy
        self.stopped: Callable[[], bool] = lambda: False  # whether to stop waiting; asked every `LISTENING` seconds
        self._jitter = random.Random()  # its own: training's random numbers must not depend on failures
        self._reached, self._last_message = False, 0.0
        self._failing_since: float | None = None

    def models(self) -> dict[str, dict[str, Any]]:
        """What it serves, by name. Raises `ServerError`, as all requests here do: see `post`."""
        ((_, served),) = self._ask([("GET", "/v1/models", None)], _served)
        return dict(served)

    def post(self, path: str, body: Any, read: Read = _as_it_is) -> Any:
        """The answer to one request.

        Raises `ServerError` if the server refuses the request, does not speak JSON, has never answered within
        `FIRST_CONTACT` seconds, or not for `patience` seconds, or `TRIES` answers were unusable, or if `read` raised
        it; `WaitingStopped`: see `stopped`.
        """
        return self.post_all(path, [body], read)[0]

    def post_all(self, path: str, bodies: Sequence[Any], read: Read = _as_it_is) -> list[Any]:
        """The answers to many requests, in their order."""
        answers = dict(self.answers([(path, body) for body in bodies], read))
        return [answers[place] for place in range(len(bodies))]

    def answers(self, requests: Sequence[tuple[str, Any]], read: Read = _as_it_is) -> Iterator[tuple[int, Any]]:
        """Place and answer of each request (path, body), as they arrive; `read` is applied to each answer.

        After one that fails for good no other is sent, or sent again; those under way still arrive, then it raises.
        """
        return self._ask([("POST", path, body) for path, body in requests], read)

    def shown(self, what: object, length: int = 200) -> str:
        """What the server sent, fit for a message: on one line, without control characters, and without our secrets."""
        text = what if isinstance(what, str) else _REPR.repr(what)
        line = " ".join(text[: 10 * length].split())[:length]
        for secret in self._address.secrets:
            line = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, line)
        return visible(line)

    def other_form(self, path: str, what: object) -> ServerError:
        """For an answer that is not of the form that OpenAI's servers give it."""
        return ServerError(
            f"{self.named} answers {path} in a form that is not OpenAI's: {self.shown(what)}. Is it an "
            "OpenAI-compatible server?"
        )

    def _ask(self, requests: Sequence[tuple[str, str, Any]], read: Read) -> Iterator[tuple[int, Any]]:
        """See `answers`; of (method, path, body)."""
        if not requests:
            return
        self._failing_since = None
        arrived: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        with start_blocking_portal() as portal:  # cancels what is under way when this is left early
            whole = portal.start_task_soon(self._ask_all, requests, read, arrived.put)
            whole.add_done_callback(lambda _: arrived.put(None))
            while True:
                if self.stopped():
                    raise WaitingStopped
                try:
                    answer = arrived.get(timeout=LISTENING)
                except Empty:
                    continue
                if answer is None:
                    break
                yield answer
            whole.result()

    async def _ask_all(
        self, requests: Sequence[tuple[str, str, Any]], read: Read, keep: Callable[[tuple[int, Any]], None]
    ) -> None:
        slots, stop = anyio.Semaphore(self.limits.concurrency), anyio.Event()
        failures: list[ServerError] = []

        async def ask(place: int, method: str, path: str, body: Any) -> None:
            async with slots:
                if stop.is_set():
                    return
                try:
                    attempt = partial(self._attempt, client, method, path, body)
                    keep((place, await self._answer(attempt, path, partial(read, place), stop)))
                except ServerError as error:
                    failures.append(error)
                    stop.set()

        async with self._address.client(self.limits.concurrency) as client, anyio.create_task_group() as tasks:
            for place, request in enumerate(requests):
                tasks.start_soon(ask, place, *request)
        if failures:
            raise failures[0]

    async def _answer(
        self, attempt: Callable[[], Awaitable[Any]], path: str, read: Callable[[Any], Any], stop: anyio.Event
    ) -> Any:
        """Send a request until there is an answer, or no hope of one."""
        began, unusable = time.monotonic(), 0
        for wait in waits(self._jitter):
            try:
                return self._read(await attempt(), path, read)
            except UnusableAnswer as error:
                unusable, problem = unusable + 1, self.shown(str(error))
            except TemporaryFailure as error:
                problem = self.shown(str(error))
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {self.shown(str(error))}"
            left = self._seconds_left(began)
            if unusable >= TRIES:
                raise ServerError(f"{self.named} {problem} ({path}, asked {unusable} times). {self._remedy}")
            if (left <= 0 or stop.is_set()) and not self._reached:
                raise ServerError(
                    f"{self.named} cannot be reached ({path}: {problem}). Start it first, or correct the address: "
                    "http://HOST:PORT, as seen from this machine."
                )
            if left <= 0 or stop.is_set():
                patience = f"{self.limits.patience:g} s"
                raise ServerError(f"{self.named} has not answered for {patience} ({path}: {problem}). {self._remedy}")
            if time.monotonic() - self._last_message > BETWEEN_MESSAGES:
                self._last_message = time.monotonic()
                logger.warning(visible(f"{self.named} fails ({problem}); retrying for {left:.0f} s more."))
            with anyio.move_on_after(min(left, wait)):
                await stop.wait()
        raise AssertionError("waits never end")

    def _read(self, answer: Any, path: str, read: Callable[[Any], Any]) -> Any:
        if isinstance(answer, dict) and answer.get("error"):  # with HTTP 200, as gateways and crashed engines do
            raise UnusableAnswer(f"answers with an error: {self.shown(answer['error'])}")
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self.other_form(path, answer) from error

    async def _attempt(self, client: httpx2.AsyncClient, method: str, path: str, body: Any) -> Any:
        """The JSON of one answer.

        Raises `httpx2.TransportError` if there is no whole answer, `TemporaryFailure` (see `TEMPORARY`),
        `UnusableAnswer` if it cannot be decompressed, `ServerError` if it is a refusal, too large, or not JSON.
        """
        seconds = self.limits.timeout if method == "POST" else min(ASKING, self.limits.timeout)
        timeout = httpx2.Timeout(seconds, connect=min(CONNECTING, seconds))
        sent = None if body is None else json.dumps(body)
        content = bytearray()
        try:
            with anyio.fail_after(seconds):
                async with client.stream(method, path, content=sent, timeout=timeout) as response:
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > MOST_BYTES:
                            raise ServerError(
                                f"{self.named} answers {path} with more than {MOST_BYTES // 2**20} MiB. Is it an "
                                "OpenAI-compatible server?"
                            )
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no complete answer within {seconds:g} s") from error
        except httpx2.DecodingError as error:
            self._reached, self._failing_since = True, None
            raise UnusableAnswer(f"sends an answer that cannot be decompressed: {error}") from error
        text = content[:5000].decode(errors="replace")
        if response.status_code in TEMPORARY:
            raise TemporaryFailure(f"HTTP {response.status_code}: {text}")
        self._reached, self._failing_since = True, None
        if not response.is_success:
            said = f"HTTP {response.status_code}, {self.shown(text, 500)}"
            raise ServerError(f"{self.named} refuses {path}: {said}. {self._remedy}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"{self.named} answers {path} with '{self.shown(text, 80)}', not JSON. Is it an OpenAI-compatible "
                "server?"
            ) from error

    def _seconds_left(self, began: float) -> float:
        """Until it is given up, after a failure."""
        now = time.monotonic()
        self._failing_since = since = self._failing_since or now
        if not self._reached:
            return min(FIRST_CONTACT, self.limits.patience) - (now - began)
        return self.limits.patience - (now - since)


def refuse_unfinished(reason: object) -> None:
    """Raise `UnusableAnswer` unless a `finish_reason` says that the model, or the limit on its tokens, ended the text.

    Servers also send "abort", "error" or null, with HTTP 200 and the text so far.
    """
    if reason not in ("stop", "length"):
        raise UnusableAnswer(f"breaks an answer off (finish_reason {reason!r})")


def waits(jitter: random.Random) -> Iterator[float]:
    """Seconds before each further try."""
    longest = FIRST_WAIT
    while True:
        yield longest * jitter.uniform(0.5, 1.0)
        longest = min(LONGEST_WAIT, 2 * longest)


def _served(number: int, answer: Any) -> dict[str, dict[str, Any]]:
    served = {entry["id"]: entry for entry in answer["data"]}
    if not all(isinstance(name, str) for name in served):
        raise TypeError
    return served
