"""Prompts and solutions as token ids, the same for every command."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from topd.errors import TOPDError
from topd.near_future.model_parts import one_beginning

logger = logging.getLogger(__name__)

TEMPLATE_SECONDS, TEMPLATE_CHARACTERS = 20.0, 50_000_000
"""Limits of rendering one conversation, far above any real need."""

_OPENED = re.compile(r"<(\w+)>\s*$")
_CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello 4711"}]


def prompt_ids(
    tokenizer: Any, prompt: Any, template_options: Mapping[str, Any] | None, *, answered: bool = False
) -> list[int]:
    """Token ids of a prompt. Messages go through the chat template, with a generation prompt unless `answered`.

    Text that already begins with the tokenizer's BOS gets no second one.
    """
    return _tokens(tokenizer, prompt_text(tokenizer, prompt, template_options, answered), prompt)


def prompt_text(tokenizer: Any, prompt: Any, template_options: Mapping[str, Any] | None, answered: bool = False) -> str:
    """The text of a prompt: text as it is, messages as the chat template renders them.

    Raises `TOPDError` if there is no template; or it fails, takes too long, or writes too much or nothing.
    """
    if isinstance(prompt, str):
        return prompt
    with explained_template(tokenizer):
        if template_options:
            _warn_of_unused(str(tokenizer.chat_template), tuple(template_options))
        text: str = tokenizer.apply_chat_template(
            plain_messages(prompt), add_generation_prompt=not answered, tokenize=False, **(template_options or {})
        )
        if not text.strip() or len(text) > TEMPLATE_CHARACTERS:
            raise ValueError(f"it writes {len(text):,} characters" if text.strip() else "it writes nothing")
    return text


@contextmanager
def explained_template(tokenizer: Any, conversations: int = 1) -> Iterator[None]:
    """Raise `TOPDError` where there is no chat template, it fails, or it takes too long for so many conversations."""
    if not tokenizer.chat_template:
        raise TOPDError("The prompts are messages, and this tokenizer has no chat template. Give prompts as text.")
    try:
        with _time_limit(TEMPLATE_SECONDS * conversations):
            yield
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TOPDError(
            f"The chat template cannot render a conversation: {reason}. Change the messages, the template's options "
            "(--chat-template-kwargs), or the template."
        ) from error


@lru_cache(maxsize=64)
def _warn_of_unused(template: str, options: tuple[str, ...]) -> None:
    """Log a warning, once, for options that a chat template does not use: they may be misspelt."""
    names = set(re.findall(r"\w+", template))
    if unused := [name for name in options if name not in names]:
        logger.warning(
            f"The chat template does not use {', '.join(unused)} of chat_template_kwargs: misspelt, or for another "
            "model?"
        )


def solution_ids(
    tokenizer: Any, prompt: Any, response: str, template_options: Mapping[str, Any], closing: int
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a response given as text, closed by `closing`, as generation would produce them.

    The response follows what the template writes before an answer (such as `<think>`); an opening tag there is not
    repeated. The response is not rendered as an assistant turn, because templates drop the reasoning of past turns.
    Both are tokenized together if that leaves the prompt's ids unchanged, else separately.
    """
    ids, text = prompt_ids(tokenizer, prompt, template_options), prompt_text(tokenizer, prompt, template_options)
    response = response.removesuffix(tokenizer.decode([closing]))
    opened = None if isinstance(prompt, str) else _OPENED.search(text[-100:])
    if opened and (repeated := re.match(rf"\s*<{opened[1]}>\s*", response)):
        response = response[repeated.end() :]
    together = _tokens(tokenizer, text + response, prompt)
    if together[: len(ids)] == ids:
        return ids, [*together[len(ids) :], closing]
    return ids, [*tokenizer(response, add_special_tokens=False)["input_ids"], closing]


def closing_id(tokenizer: Any, ends: Sequence[int], template_options: Mapping[str, Any], conversational: bool) -> int:
    """The token that closes a response: in conversations, the end token that the template writes after an assistant
    turn; if it writes none, and for text, the first of `ends`."""
    if not conversational:
        return ends[0]
    try:
        text = prompt_text(tokenizer, _CONVERSATION, template_options, answered=True)
    except TOPDError:  # a template may reject this conversation
        return ends[0]
    after = tokenizer(text.rpartition(_CONVERSATION[1]["content"])[2], add_special_tokens=False)["input_ids"]
    return next((int(token) for token in after if token in ends), ends[0])


def plain_messages(value: Any) -> Any:
    """Messages as templates of text read them, at any depth.

    Without the null keys that Arrow adds (`tool_calls`, `name`): templates test whether a key exists. Content that is
    a list of text parts is joined, as `topd.loading.rows` joins it.
    """
    if isinstance(value, dict):
        return {key: plain_messages(item) for key, item in value.items() if item is not None or key == "content"}
    if not isinstance(value, list):
        return value
    items = [plain_messages(item) for item in value]
    texts = [item["text"] for item in items if isinstance(item, dict) and item.get("type") == "text" and "text" in item]
    return "".join(texts) if texts and len(texts) == len(items) else items


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after this time: a template may loop forever. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _tokens(tokenizer: Any, text: str, prompt: Any) -> list[int]:
    """Token ids of a prompt's text; a template writes its own special tokens."""
    return one_beginning(tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"], tokenizer)
