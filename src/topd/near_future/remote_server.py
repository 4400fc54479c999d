"""One server over HTTP: pooled connections, so many requests at a time, patience with a server that fails."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2

from topd.errors import TeacherServerError

logger = logging.getLogger(__name__)

TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which a request is sent again."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, doubled before each later one, up to the longest; each is shortened at random."""
BETWEEN_MESSAGES = 10.0


@dataclass(frozen=True)
class Limits:
    """What is asked of a server, and how long it is waited for.

    Attributes:
        timeout: seconds for one request.
        patience: seconds without any answer, after which a server is given up.
        concurrency: requests at a time, from this process.
    """

    timeout: float = 300.0
    patience: float = 600.0
    concurrency: int = 16


class RemoteServer:
    """JSON in, JSON out.

    Args:
        url: of an OpenAI-compatible server, with or without `/v1`.
    """

    def __init__(self, url: str, limits: Limits = Limits()) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.limits = limits
        connections = httpx2.Limits(
            max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency, keepalive_expiry=60
        )
        timeout = httpx2.Timeout(limits.timeout, connect=min(10.0, limits.timeout))
        self._client = httpx2.Client(base_url=self.url, limits=connections, timeout=timeout)
        self._jitter = random.Random()  # its own: training's random numbers must not depend on failures
        self._last_answer = self._last_message = 0.0

    def get(self, path: str) -> Any:
        """Raises `TeacherServerError`, as all requests here do: see `post`."""
        self._last_answer = time.monotonic()
        return self._request("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """The answer to one request.

        Raises:
            TeacherServerError: it refuses the request, does not speak JSON, or has not answered for `patience` seconds.
        """
        return self.post_all(path, [body])[0]

    def post_all(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        """The answers to many requests, in their order. One that fails for good ends all."""
        self._last_answer = time.monotonic()
        with ThreadPoolExecutor(self.limits.concurrency) as pool:
            answers = [pool.submit(self._request, "POST", path, body) for body in bodies]
            try:
                return [answer.result() for answer in answers]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, method: str, path: str, body: Any) -> Any:
        for attempt in itertools.count():
            try:
                response = self._client.request(method, path, json=body)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in TEMPORARY:
                    self._last_answer = time.monotonic()
                    return self._json(response, path)
                problem = f"HTTP {response.status_code}: {response.text[:200]}"
            left = self.limits.patience - (time.monotonic() - self._last_answer)
            if left <= 0:
                raise TeacherServerError(
                    f"The teacher's server at {self.url} has not answered for {self.limits.patience:g} s ({path}: "
                    f"{problem}). Start it again, then resume from the last checkpoint (--resume_from_checkpoint "
                    "true); teacher_server_patience and teacher_server_timeout say how long it is waited for."
                )
            self._say(f"The teacher's server at {self.url} fails ({problem}); trying for {left:.0f} s more.")
            longest = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            time.sleep(min(left, longest * self._jitter.uniform(0.5, 1.0)))
        raise AssertionError("unreachable")

    def _json(self, response: httpx2.Response, path: str) -> Any:
        if response.is_error:
            raise TeacherServerError(
                f"The teacher's server at {self.url} refuses {path}: HTTP {response.status_code}, "
                f"{response.text[:500].strip()}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise TeacherServerError(
                f"{self.url}{path} answers {response.text[:80]!r}, not JSON. Is it an OpenAI-compatible server?"
            ) from error

    def _say(self, message: str) -> None:
        if time.monotonic() - self._last_message > BETWEEN_MESSAGES:
            self._last_message = time.monotonic()
            logger.warning(message)
