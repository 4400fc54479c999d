"""What is asked of a model, here or behind a server: respond to these prompts. One protocol, the same records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from topd.errors import TOPDError
from topd.loading import prompts as prompting

SEED_STRIDE = 1_000_003
"""A response's own seed is `seed * SEED_STRIDE + number`."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        temperature: 0 decodes greedily. 0.6 is our choice: the paper gives it for the warm start's teacher only, and
            none for evaluation; the same goes for the next two.
        top_p: share of the distribution that is sampled from.
        max_new_tokens: of a response; one that is longer is cut and marked.
        seed: of the whole run; every response has its own random numbers.
        chat_template_kwargs: for the chat template, such as {"enable_thinking": False}.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 16384
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """One wanted response: the prompt (text or messages), and a number, which with the seed fixes its randomness."""

    number: int
    prompt: Any


@dataclass(frozen=True)
class Response:
    """What the model wrote, without special tokens.

    Attributes:
        truncated: whether the limit, not the model, ended it.
        tokens: how many it has, the one that ends it included.
    """

    text: str
    truncated: bool
    tokens: int


class Engine(Protocol):
    """Responds to prompts. `together` responses come, and are kept, at a time."""

    together: int

    def check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Raise `TOPDError` where it is known beforehand that it cannot respond."""
        ...

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """Responses with their numbers, as they are ready; all of `requests` in the end."""
        ...


def as_chat(prompt: Any, chat: bool) -> Any:
    """With `chat`, text as the user's turn; messages as they are."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def prompt_ids(prompt: Any, tokenizer: Any, sampling: Sampling) -> list[int]:
    """Token ids: messages go through the chat template, text is taken as it is.

    Raises:
        TOPDError: messages, and a tokenizer without a chat template.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise TOPDError("The prompts are messages, and this tokenizer has no chat template. Give prompts as text.")
    return prompting.prompt_ids(tokenizer, prompt, sampling.chat_template_kwargs or {})
