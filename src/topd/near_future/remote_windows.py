"""Windows from a server that speaks OpenAI's completions in token ids: vLLM, SGLang."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.errors import ServerError, TokenizerMismatchError
from topd.generation import NEUTRAL
from topd.near_future.shared_prefix import until_eos
from topd.near_future.windows import Windows
from topd.openai_server import OpenAIServer

PREFIXES_A_REQUEST = 8
KNOWN_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159 > 22/7?",
    "  two spaces, a\ttab,\n\na blank line and naïve café, ½ × ∑ → 你好 🙂",
    "def f(x):\n    return {'a': x ** 2, \"b\": [0x1F, 1e-8]}",
)
"""What student and server must tokenize alike; the student's special tokens are added."""


class RemoteWindows:
    """Continues prefixes on a server, token ids in and out.

    Args:
        server: where.
        model: the name under which it serves the teacher.
        eos_token_ids: ids that end a window; the one that was generated is part of it.
        temperature: 0 decodes greedily; else samples from the full distribution.
        context: tokens that the server takes for prompt and continuation, or None if it does not say.
    """

    def __init__(
        self,
        server: OpenAIServer,
        model: str,
        eos_token_ids: Sequence[int],
        temperature: float = 0.0,
        context: int | None = None,
    ) -> None:
        self.server, self.model, self.context = server, model, context
        self.eos_token_ids = list(eos_token_ids)
        self.temperature = temperature

    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """Continue each prefix (token ids, 1-D) by at most `length` tokens, fewer only where EOS comes first.

        Raises:
            ServerError: see `OpenAIServer.post`; or the answer is not in token ids, or is to another prompt.
        """
        device = prefixes[0].device if prefixes else None
        tokens = torch.zeros(len(prefixes), length, dtype=torch.long)
        given = torch.zeros(len(prefixes), length, dtype=torch.bool)
        for row, new in enumerate(self._complete([prefix.tolist() for prefix in prefixes], length)):
            tokens[row, : len(new)] = torch.tensor(new)
            given[row, : len(new)] = True
        mask = given & until_eos(tokens, torch.tensor(self.eos_token_ids))
        return Windows((tokens * mask).to(device), mask.to(device))

    def _complete(self, prompts: list[list[int]], length: int) -> Iterator[list[int]]:
        """New token ids of each prompt."""
        asked = [prompts[start : start + PREFIXES_A_REQUEST] for start in range(0, len(prompts), PREFIXES_A_REQUEST)]
        settings = NEUTRAL | {
            "model": self.model,
            "max_tokens": length,
            "temperature": self.temperature,
            "top_p": 1.0,
            "stop_token_ids": self.eos_token_ids,
            "return_token_ids": True,
        }
        bodies = [settings | {"prompt": prompts} for prompts in asked]
        for sent, answer in zip(asked, self.server.post_all("/v1/completions", bodies), strict=True):
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(sent):
                raise self._unfit(f"answers {len(sent)} prompts with {len(choices)} completions")
            for prompt, choice in zip(sent, choices, strict=True):
                yield self._checked(choice, prompt, length)

    def _checked(self, choice: dict[str, Any], prompt: list[int], length: int) -> list[int]:
        new, read = choice.get("token_ids"), choice.get("prompt_token_ids")
        if new is None:
            raise self._unfit("returns text only")
        if read is not None and read != prompt:
            raise self._unfit("changes the prompts that it is sent")
        if len(new) > length:
            raise self._unfit(f"returns {len(new)} tokens where {length} were asked for")
        return list(new)

    def _unfit(self, what: str) -> ServerError:
        return ServerError(
            f"The teacher's server at {self.server.url} {what}. Windows need token ids in and out, untouched: vLLM "
            "from 0.10.2 (return_token_ids), or an SGLang that has return_token_ids."
        )


def connect(
    server: OpenAIServer,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    model: str | None = None,
    temperature: float = 0.0,
) -> RemoteWindows:
    """Ask a server whether it is the teacher's, before it is needed.

    Args:
        server: that is asked.
        tokenizer: the student's.
        eos_token_ids: ids that end a window.
        model: the name under which the teacher must be served; None takes the only one there is.
        temperature: of the windows; 0 decodes greedily.

    Raises:
        ServerError: no such model, several to choose from, or answers without token ids.
        TokenizerMismatchError: the server cuts text into other tokens than the student's tokenizer.
    """
    name, context = served_as(server, model)
    check_tokenizer(server, name, tokenizer)
    windows = RemoteWindows(server, name, eos_token_ids, temperature, context)
    windows.continue_([torch.tensor(windows.eos_token_ids[:1])], 1)
    return windows


def served_as(server: OpenAIServer, model: str | None) -> tuple[str, int | None]:
    """The teacher's name on the server, and its context if the server says. Raises `ServerError`: see `connect`."""
    served = server.models()
    if len(served) != 1 if model is None else model not in served:
        wanted = f"does not serve {model!r}" if model is not None else "serves several models"
        raise ServerError(
            f"The teacher's server at {server.url} {wanted}, but: {', '.join(sorted(served))}. Name the teacher as the "
            "server does, in teacher_server_model, or serve it under that name (--served-model-name)."
        )
    name = model if model is not None else next(iter(served))
    return name, served[name].get("max_model_len")


def check_tokenizer(server: OpenAIServer, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `TokenizerMismatchError` unless the server cuts known texts into the same token ids."""
    for text in (*KNOWN_TEXTS, "".join(tokenizer.all_special_tokens)):
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        theirs, ours = server.post("/tokenize", body)["tokens"], tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise TokenizerMismatchError(
                f"The teacher's server at {server.url} ({model}) and the student do not share a tokenizer: {text!r} is "
                f"{theirs[:12]} there and {ours[:12]} here. Both models must come from the same family; serve the "
                "teacher that belongs to this student (and its own tokenizer, without --tokenizer)."
            )
