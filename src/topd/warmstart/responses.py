"""What is asked of a teacher, a model here or one behind a server: respond to these prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. Paper (appendix B.1): temperature 0.6, top_p 0.95, 16384 new tokens.

    Attributes:
        temperature: 0 decodes greedily.
        top_p: share of the distribution that is sampled from.
        max_new_tokens: of a response; one that is longer is cut and marked as truncated.
        seed: of the whole run; every response has its own random numbers.
        chat_template_kwargs: for prompts that are messages.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 16384
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """One wanted response: its number in the run, and the prompt (text, or messages)."""

    number: int
    prompt: Any


@dataclass(frozen=True)
class Response:
    """What the teacher wrote, without special tokens.

    Attributes:
        truncated: whether the limit, not the teacher, ended it.
        tokens: how many it has.
    """

    text: str
    truncated: bool
    tokens: int


class Teacher(Protocol):
    """Responds to prompts. `together` responses come, and are kept, at a time."""

    together: int

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Raise `TOPDError` where it is known beforehand that it cannot respond."""
        ...

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """Responses with their numbers, as they are ready; all of `requests` in the end."""
        ...
