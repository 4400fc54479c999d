"""Windows from a server that speaks OpenAI's completions in token ids: vLLM, SGLang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.errors import ServerError, TokenizerMismatchError
from topd.near_future.continuations import until_eos
from topd.near_future.model_parts import NEUTRAL
from topd.near_future.windows import Windows
from topd.teachers.openai_server import OpenAIServer, UnusableAnswer, refuse_unfinished

PREFIXES_A_REQUEST = 8
KNOWN_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159 > 22/7?",
    "  two spaces, a\ttab,\n\na blank line and naïve café, ½ × ∑ → 你好 🙂",
    "def f(x):\n    return {'a': x ** 2, \"b\": [0x1F, 1e-8]}",
)
"""What student and server must tokenize alike; the student's special tokens are added."""


class ServerWindows:
    """Continues prefixes on a server greedily, token ids in and out.

    `model`: the name under which the server serves the teacher. `eos_token_ids`: ids that end a window; the one that
    was generated is part of it. `context`: tokens that the server takes for prompt and continuation, or None if it does
    not say. `vocabulary`: token ids are below this; None accepts any.
    """

    def __init__(
        self, server: OpenAIServer, model: str, eos_token_ids: Sequence[int], context: int | None = None,
        vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        self.server, self.model, self.context, self.vocabulary = server, model, context, vocabulary
        self.eos_token_ids = list(eos_token_ids)
        # entered around each use of the server; the trainer makes all processes fail if one does
        self.together: Callable[[], AbstractContextManager[None]] = nullcontext

    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """Continue each prefix (token ids, 1-D) by at most `length` tokens, fewer only where EOS comes first.

        Raises `ServerError`: see `OpenAIServer.post`; or if the answer is not in token ids, is to another prompt, or is
        cut short each time.
        """
        device, prompts = prefixes[0].device if prefixes else None, [prefix.tolist() for prefix in prefixes]
        asked = [prompts[start : start + PREFIXES_A_REQUEST] for start in range(0, len(prompts), PREFIXES_A_REQUEST)]
        settings = NEUTRAL | {
            "model": self.model, "max_tokens": length, "temperature": 0.0, "top_p": 1.0,
            "stop_token_ids": self.eos_token_ids, "return_token_ids": True,
        }  # fmt: skip

        def read(number: int, answer: Any) -> list[list[int]]:
            sent, choices = asked[number], sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(len(sent))):
                raise self._unfit(f"answers {len(sent)} prompts with {len(choices)} completions")
            return [self._checked(choice, prompt, length) for prompt, choice in zip(sent, choices, strict=True)]

        bodies = [settings | {"prompt": some} for some in asked]
        with self.together():
            windows = [*chain.from_iterable(self.server.post_all("/v1/completions", bodies, read))]
        padded = [[*new, *[-1] * (length - len(new))] for new in windows]
        tokens = torch.tensor(padded, dtype=torch.long).reshape(len(prefixes), length)
        mask = (tokens >= 0) & until_eos(tokens, torch.tensor(self.eos_token_ids))
        return Windows((tokens * mask).to(device), mask.to(device))

    def knows(self, token: object) -> bool:
        """Whether it is a token id."""
        return type(token) is int and token >= 0 and (self.vocabulary is None or token < self.vocabulary)

    def _checked(self, choice: dict[str, Any], prompt: list[int], length: int) -> list[int]:
        """The new token ids. Raises `UnusableAnswer` for a window that is cut short, `ServerError` for another form."""
        refuse_unfinished(choice.get("finish_reason", "stop"))
        new, read = choice.get("token_ids"), choice.get("prompt_token_ids")
        if new is None:
            raise self._unfit("returns text only")
        if read is not None and read != prompt:
            raise self._unfit("changes the prompts that it is sent")
        if len(new) > length:
            raise self._unfit(f"returns {len(new)} tokens where {length} were asked for")
        strange = [token for token in new if not self.knows(token)]
        if strange:
            known = "" if self.vocabulary is None else f" (the student has {self.vocabulary})"
            raise self._unfit(f"returns {self.server.shown(strange[0], 40)} as a token id{known}")
        if len(new) < length and not set(new) & set(self.eos_token_ids):
            raise UnusableAnswer(f"ends a window after {len(new)} of {length} tokens, without an end token")
        return list(new)

    def _unfit(self, what: str) -> ServerError:
        return ServerError(
            f"{self.server.named} {what}. Windows need token ids in and out, untouched: vLLM "
            "from 0.10.2 (return_token_ids), or an SGLang that has return_token_ids."
        )


def connect(
    server: OpenAIServer, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], model: str | None = None,
    vocabulary: int | None = None,
) -> ServerWindows:  # fmt: skip
    """Ask a server whether it is the teacher's, before it is needed.

    `tokenizer`: the student's. `eos_token_ids`: ids that end a window. `model`: the name under which the teacher must
    be served; None takes the only one there is. `vocabulary`: rows of the student's head; None: as many as its
    tokenizer has tokens. Raises `ServerError` for no such model, several to choose from, or answers without token ids;
    `TokenizerMismatchError` if the server cuts text into other tokens than the student's tokenizer.
    """
    name, context = served_as(server, model)
    check_tokenizer(server, name, tokenizer)
    windows = ServerWindows(server, name, eos_token_ids, context, vocabulary or len(tokenizer))
    windows.continue_([torch.tensor(windows.eos_token_ids[:1])], 1)
    return windows


def served_as(server: OpenAIServer, model: str | None) -> tuple[str, int | None]:
    """The teacher's name on the server, and its context if the server says. Raises `ServerError`: see `connect`."""
    served = server.models()
    if len(served) != 1 if model is None else model not in served:
        wanted = f"does not serve {model!r}" if model is not None else "serves several models"
        raise ServerError(
            f"{server.named} {wanted}, but: {server.shown(', '.join(sorted(served)))}. Name the teacher as the "
            "server does, in teacher_server_model, or serve it under that name (--served-model-name)."
        )
    name = model if model is not None else next(iter(served))
    context = served[name].get("max_model_len")
    if context is not None and (type(context) is not int or context < 1):
        raise server.other_form("/v1/models", served[name])
    return name, context


def check_tokenizer(server: OpenAIServer, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `TokenizerMismatchError` unless the server cuts known texts into the same token ids."""

    def read(number: int, answer: Any) -> list[int]:
        return [int(token) for token in answer["tokens"]]

    for text in (*KNOWN_TEXTS, "".join(tokenizer.all_special_tokens)):
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        theirs, ours = server.post("/tokenize", body, read), tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise TokenizerMismatchError(
                f"{server.named} ({model}) and the student do not share a tokenizer: {text!r} is "
                f"{theirs[:12]} there and {ours[:12]} here. Both models must come from the same family; serve the "
                "teacher that belongs to this student (and its own tokenizer, without --tokenizer)."
            )
