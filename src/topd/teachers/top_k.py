"""Top-k teacher: KL from the teacher's top-k log-probabilities. They and the windows come from a server (vLLM)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.algorithm import (
    DistillationLoss,
    Head,
    KnownTokens,
    LikelihoodTerms,
    TokenScores,
    known_token_loss,
    score_known_tokens,
)
from topd.algorithm.transport import GroundCost
from topd.algorithm.vocabulary import Direction
from topd.errors import ServerError, TOPDError
from topd.near_future.windows import Branches, Places, Prefill, Rollouts, Windows
from topd.teachers.server_windows import ServerWindows

ROUNDING = 1e-4
"""How far above 0 a log-probability may be, in nats, from rounding."""


class TopKTeacher:
    """A teacher behind a server, of which the most likely tokens of each position are known. A `Teacher`.

    `known`: tokens of each position whose probability the server is asked for, in addition to the sampled one.
    """

    cache_bytes_per_token = 0.0

    def __init__(self, windows: ServerWindows, known: int) -> None:
        self.windows, self.known = windows, known

    def prefill(self, rollouts: Rollouts, keep_prefix: bool = True) -> Prefill:
        """See `known_tokens`; the server keeps the prefix itself."""
        return Prefill(self.known_tokens(rollouts)._asdict())

    def scores(
        self, hidden: Tensor, head: Head, states: Mapping[str, Tensor], tokens: Tensor, direction: Direction = "reverse"
    ) -> TokenScores:
        return score_known_tokens(hidden, head, KnownTokens(**states), tokens, direction)

    def loss(
        self, hidden: Tensor, head: Head, states: Mapping[str, Tensor], weights: Tensor,
        terms: LikelihoodTerms | None = None, direction: Direction = "reverse",
    ) -> DistillationLoss:  # fmt: skip
        return known_token_loss(hidden, head, KnownTokens(**states), weights, terms, direction)

    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        raise TOPDError("A teacher on a server has no hidden states here: use guidance_context=student.")

    def window_costs(
        self, ours: Windows, theirs: Windows, places: Places, hidden: bool = False, cost: GroundCost = "cosine"
    ) -> Tensor:
        raise TOPDError("A teacher on a server has no embeddings here: use embedding=student or student_hidden.")

    def continue_(self, places: Places, length: int, prefill: Prefill | None = None) -> Windows:
        return self.windows.continue_(places.prefixes(), length)

    def known_tokens(self, rollouts: Rollouts) -> KnownTokens:
        """[rollout, position, known + 1] of each response token; one sure token where it is masked.

        Raises `ServerError`: see `OpenAIServer.post`; or for no log-probabilities of prompts, or values that are none.
        """
        real = rollouts.response_mask.bool()
        lengths = real.sum(1).tolist()
        prompts = [rollouts.prefix(row, length).tolist() for row, length in enumerate(lengths)]
        body = {"model": self.windows.model, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": self.known}
        bodies = [body | {"prompt": prompt} for prompt in prompts]

        def read(row: int, answer: Any) -> list[list[tuple[int, float]]]:
            return self._of_response(answer, prompts[row], lengths[row])

        tokens = torch.zeros(*real.shape, self.known + 1, dtype=torch.long)
        log_probs = torch.full(tokens.shape, -torch.inf)
        log_probs[:, :, 0] = 0.0  # masked positions: sure of one token
        with self.windows.together():
            answers = self.windows.server.post_all("/v1/completions", bodies, read)
        for row, positions in enumerate(answers):
            for position, found in enumerate(positions):
                known, values = zip(*found, strict=True)
                tokens[row, position, : len(found)] = torch.tensor(known)
                log_probs[row, position, : len(found)] = torch.tensor(values)
        device = rollouts.response_ids.device
        return KnownTokens(tokens.to(device), log_probs.to(device))

    def _of_response(self, answer: Any, prompt: list[int], length: int) -> list[list[tuple[int, float]]]:
        """(token, log-probability) at each response position, the sampled token first."""
        given = answer["choices"][0].get("prompt_logprobs")
        if given is None or len(given) != len(prompt):
            raise ServerError(
                f"{self.windows.server.named} gives no log-probabilities of the prompt's tokens. "
                "Token losses from a server need vLLM (prompt_logprobs); or give the teacher's weights as well."
            )
        found = []
        for token, entries in zip(prompt[len(prompt) - length :], given[len(prompt) - length :], strict=True):
            known = self._log_probs(entries)
            others = sorted(((v, p) for v, p in known.items() if v != token), key=lambda pair: -pair[1])
            found.append([(token, known[token]), *others[: self.known]])
        return found

    def _log_probs(self, entries: Any) -> dict[int, float]:
        """Log-probability (nats) of each token of one position. Raises `ServerError` for what cannot be one."""
        known = {int(name): float(entry["logprob"]) for name, entry in entries.items()}
        named = self.windows.server.named
        for token, value in known.items():
            if not math.isfinite(value):
                raise ServerError(
                    f"{named} gives {value} as the log-probability of token {token}: the teacher computes NaN or "
                    "infinity there. Serve it in bfloat16 or float32; float16 overflows."
                )
            if not self.windows.knows(token):
                raise ServerError(
                    f"{named} gives a log-probability of token {token}; the student has {self.windows.vocabulary} "
                    "tokens. Serve the teacher that belongs to this student."
                )
        total = math.fsum(math.exp(value) for value in known.values())
        if total > 1 + len(known) * ROUNDING:
            raise ServerError(
                f"{named} gives probabilities that add up to {total:.4g}. Serve the teacher with raw log-probabilities "
                "(vLLM: --logprobs-mode raw_logprobs)."
            )
        return {token: min(value, 0.0) for token, value in known.items()}
