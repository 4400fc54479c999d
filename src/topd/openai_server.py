"""One OpenAI-compatible server over HTTP: pooled connections, so many requests at a time, patience when it fails."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx2

from topd.errors import ServerError
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


@dataclass(frozen=True)
class Limits:
    """What is asked of a server, and how long it is waited for.

    Attributes:
        timeout: seconds for one request.
        patience: seconds from the first failure on, without any answer since, after which a server is given up.
        concurrency: requests at a time, from this process.
    """

    timeout: float = 300.0
    patience: float = 600.0
    concurrency: int = 16


class OpenAIServer:
    """JSON in, JSON out.

    Args:
        url: with or without `/v1`.
        name: of the server, for messages.
        remedy: what to do when it refuses a request or is given up, for messages.

    Raises:
        ServerError: `url` is no address.
    """

    def __init__(
        self, url: str, limits: Limits = Limits(), name: str = "The server", remedy: str = "Mend or restart it."
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.limits, self._named, self._remedy = limits, f"{name} at {self.url}", remedy
        _check_address(self.url, name)
        self._client = self._connections()
        self._jitter = random.Random()  # its own: training's random numbers must not depend on failures
        self._reached, self._last_message = False, 0.0
        self._failing_since: float | None = None

    def models(self) -> dict[str, dict[str, Any]]:
        """What it serves, by name. Raises `ServerError`, as all requests here do: see `post`."""
        self._failing_since = None
        answer = self._request("GET", "/v1/models", None, threading.Event())
        try:
            return {entry["id"]: entry for entry in answer["data"]}
        except (KeyError, TypeError) as error:
            raise ServerError(
                f"{self._named} answers /v1/models in a form that is not OpenAI's: {str(answer)[:200]}. Is it an "
                "OpenAI-compatible server?"
            ) from error

    def post(self, path: str, body: Any) -> Any:
        """The answer to one request.

        Raises:
            ServerError: it refuses the request, does not speak JSON, has never answered within `FIRST_CONTACT` seconds,
                or not for `patience` seconds.
        """
        return self.post_all(path, [body])[0]

    def post_all(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        """The answers to many requests, in their order."""
        answers = dict(self.answers([(path, body) for body in bodies]))
        return [answers[place] for place in range(len(bodies))]

    def answers(self, requests: Sequence[tuple[str, Any]]) -> Iterator[tuple[int, Any]]:
        """Place and answer of each request (path, body), as they arrive.

        After one that fails for good no other is sent, or sent again; those under way still arrive, then it raises.
        """
        self._failing_since = None
        stop, pool, failure = threading.Event(), ThreadPoolExecutor(self.limits.concurrency), None
        futures = {
            pool.submit(self._request, "POST", path, body, stop): place for place, (path, body) in enumerate(requests)
        }
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                elif failure is None:
                    failure = error
                    stop.set()
                    for other in futures:
                        other.cancel()
        except BaseException:  # interrupted: do not wait for an hour
            stop.set()
            self._client.close()
            self._client = self._connections()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _connections(self) -> httpx2.Client:
        most = self.limits.concurrency
        limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=60)
        return httpx2.Client(base_url=self.url, limits=limits)

    def _request(self, method: str, path: str, body: Any, stop: threading.Event) -> Any:
        client, began = self._client, time.monotonic()
        seconds = self.limits.timeout if method == "POST" else min(ASKING, self.limits.timeout)
        timeout = httpx2.Timeout(seconds, connect=min(CONNECTING, seconds))
        longest = FIRST_WAIT
        while True:
            try:
                response = client.request(method, path, json=body, timeout=timeout)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in TEMPORARY:
                    self._reached, self._failing_since = True, None
                    return self._json(response, path)
                problem = f"HTTP {response.status_code}: {response.text[:200]}"
            left = self._seconds_left(began)
            if left <= 0 or stop.is_set():
                raise self._given_up(path, problem)
            self._say(f"{self._named} fails ({problem}); trying for {left:.0f} s more.")
            stop.wait(min(left, longest * self._jitter.uniform(0.5, 1.0)))
            longest = min(LONGEST_WAIT, 2 * longest)

    def _seconds_left(self, began: float) -> float:
        """Until it is given up, after a failure."""
        now = time.monotonic()
        self._failing_since = since = self._failing_since or now  # other threads may have set it
        if not self._reached:
            return min(FIRST_CONTACT, self.limits.patience) - (now - began)
        return self.limits.patience - (now - since)

    def _given_up(self, path: str, problem: str) -> ServerError:
        if not self._reached:
            return ServerError(
                f"{self._named} cannot be reached ({path}: {problem}). Start it first, or mend the address: "
                "http://HOST:PORT, as it is seen from this machine."
            )
        return ServerError(
            f"{self._named} has not answered for {self.limits.patience:g} s ({path}: {problem}). {self._remedy}"
        )

    def _json(self, response: httpx2.Response, path: str) -> Any:
        if response.is_error:
            said = response.text[:500].strip()
            raise ServerError(f"{self._named} refuses {path}: HTTP {response.status_code}, {said}. {self._remedy}")
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(
                f"{self.url}{path} answers {response.text[:80]!r}, not JSON. Is it an OpenAI-compatible server?"
            ) from error

    def _say(self, message: str) -> None:
        if time.monotonic() - self._last_message > BETWEEN_MESSAGES:
            self._last_message = time.monotonic()
            logger.warning(visible(message))


def _check_address(url: str, name: str) -> None:
    try:
        parsed = httpx2.URL(url)
        good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except (httpx2.InvalidURL, TypeError):
        good = False
    if not good:
        raise ServerError(f"{name}: {url!r} is no address. Write http://HOST:PORT (or https).")
