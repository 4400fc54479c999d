"""Does guidance at one fork bring the student back? Local correction (section 5.2, Fig. 5) for any pair.

At one fork of a rollout the student takes M gradient steps on its window alone, each arm from the same weights; then it
continues the same prefix again. D_OT to the teacher's window says how far it came, but TOPD's own targets use the plan
that defines D_OT: so the teacher's likelihood of the new window, the share of tokens that equal the teacher's, and,
where problems have answers, the share of continuations that end right are measured too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from topd.algorithm import highest_loss, is_fork
from topd.algorithm.forks import false_alarm_threshold
from topd.generation import end_token_ids, padding_id
from topd.near_future import (
    DistilledModel,
    LocalModel,
    Rollouts,
    Windows,
    near_future_transport,
)
from topd.near_future.sampling import written_rollouts
from topd.training.config import TOPDConfig
from topd.training.futures import NearFuture
from topd.training.guided import guided_windows
from topd.training.step import score, topd_loss

ARMS: dict[str, dict[str, Any]] = {
    "opd": {"guidance_weight": 0.0},
    "topd": {},
    "own tokens": {"guidance_target": "own"},
    "same index": {"guidance_target": "same_index"},
    "teacher's contexts": {"guidance_context": "teacher", "teacher_context_loss": "reverse_kl"},
}
"""What is added to OPD's loss on the window, as options of `TOPDConfig`; "opd" adds nothing."""


@dataclass(frozen=True)
class CorrectOptions:
    """Attributes:
    window_length: K.
    share: of positions that are candidates, as in training.
    false_alarm_share: the bottom share of all candidates by D_OT are no forks.
    steps: M; the paper takes 5.
    learning_rate: of AdamW; the paper does not give it, our choice.
    guidance_weight: lambda; the paper does not give it, our choice.
    arms: names of `ARMS`.
    """

    window_length: int = 50
    share: float = 0.0225
    false_alarm_share: float = 0.30
    steps: int = 5
    learning_rate: float = 1e-4
    guidance_weight: float = 1.0
    arms: tuple[str, ...] = tuple(ARMS)
    seed: int = 0


@dataclass(frozen=True)
class Fork:
    """A place where the futures part: [token] prefix, and both windows as batches of one."""

    rollout: int
    position: int
    token_loss: float
    prefix: Tensor
    ours: Windows
    theirs: Windows
    distance: float


@dataclass(frozen=True)
class Outcome:
    """The student's window at a fork, and how near it is to the teacher's.

    Attributes:
        window: token ids.
        distance: D_OT to the teacher's window.
        teacher_log_likelihood: mean log p_T of the window's tokens, nats.
        agreement: share of positions of the teacher's window with the same token.
        right: whether the whole continuation ends right; None where the task has no answers.
    """

    window: list[int] = field(repr=False)
    distance: float
    teacher_log_likelihood: float
    agreement: float
    right: bool | None


@torch.no_grad()
def find_forks(
    student: DistilledModel, teacher: DistilledModel, rollouts: Rollouts, options: CorrectOptions
) -> list[Fork]:
    """The fork with the highest token loss of each rollout that has one."""
    mask = rollouts.loss_mask.bool()
    ours_read, theirs_read = student.read(rollouts), teacher.read(rollouts)
    scores = score(rollouts, ours_read.hidden, student, theirs_read.hidden, teacher, config_of(options, "opd"))
    rows, positions = highest_loss(scores.kl, mask, share=options.share).nonzero(as_tuple=True)
    k = options.window_length
    ours = student.continue_(rollouts, ours_read, scores.student_greedy, rows, positions, k)
    theirs = teacher.continue_(rollouts, theirs_read, scores.teacher_greedy, rows, positions, k)
    distance = near_future_transport(ours, theirs, rollouts, rows, positions, student, teacher).distance
    fork = is_fork(distance, threshold=false_alarm_threshold(distance, options.false_alarm_share))
    found = []
    for row in range(len(rollouts)):
        here = (fork & (rows == row)).nonzero().squeeze(-1)
        if len(here) == 0:
            continue
        one = here[scores.kl[rows[here], positions[here]].argmax()]
        position = int(positions[one])
        found.append(
            Fork(row, position, float(scores.kl[row, position]), rollouts.prefix(row, position), ours[one[None]],
                 theirs[one[None]], float(distance[one]))
        )  # fmt: skip
    return found


class Corrector:
    """Takes a student to a fork and back to where it started.

    Args:
        student: a model of transformers; its weights are as before after every call.
        pair: the same student and the teacher.
        is_right: (rollout, the whole text after the prompt) -> whether it ends right; None: no answers.
        prompt_lengths: [rollout] tokens of each prompt, needed with `is_right`.
    """

    def __init__(
        self,
        student: Any,
        pair: tuple[DistilledModel, DistilledModel],
        tokenizer: Any,
        options: CorrectOptions,
        is_right: Callable[[int, str], bool] | None = None,
        prompt_lengths: list[int] | None = None,
        max_new_tokens: int = 0,
    ) -> None:
        self.student, self.pair, self.tokenizer, self.options = student, pair, tokenizer, options
        self.is_right, self.prompt_lengths, self.max_new_tokens = is_right, prompt_lengths, max_new_tokens
        self._start = {name: value.detach().clone() for name, value in student.state_dict().items()}

    def correct(self, fork: Fork, arm: str) -> Outcome:
        """M steps of an arm on the fork's window, then the window again."""
        options = config_of(self.options, arm)
        row = self._row(fork.prefix, fork.ours)
        self._train(row, fork, options)
        outcome = self.outcome(fork)
        self.student.load_state_dict(self._start)
        return outcome

    @torch.no_grad()
    def outcome(self, fork: Fork) -> Outcome:
        """Where the student goes from the fork's prefix now."""
        ours, teacher = self.pair
        ends = end_token_ids(self.student.generation_config, self.tokenizer)
        source = LocalModel(self.student, padding_id(self.tokenizer), ends)
        longest = max(self.options.window_length, self.max_new_tokens if self.is_right else 0)
        whole = source.continue_([fork.prefix], longest)
        window = Windows(whole.tokens[:, : self.options.window_length], whole.mask[:, : self.options.window_length])
        row = self._row(fork.prefix, window)
        at = torch.zeros(1, dtype=torch.long, device=window.tokens.device)
        distance = near_future_transport(window, fork.theirs, row, at, at, ours, teacher).distance
        states = teacher.hidden(row)[0][: int(window.mask.sum())]
        log_probs = teacher.head().logits(states).log_softmax(-1)
        tokens = window.tokens[0][window.mask[0]]
        theirs = fork.theirs.tokens[0][fork.theirs.mask[0]]
        shared = min(len(tokens), len(theirs))
        right = None
        if self.is_right is not None and self.prompt_lengths is not None:
            text = torch.cat([fork.prefix[self.prompt_lengths[fork.rollout] :], whole.tokens[0][whole.mask[0]]])
            right = self.is_right(fork.rollout, self.tokenizer.decode(text, skip_special_tokens=True))
        return Outcome(
            tokens.tolist(),
            float(distance),
            float(log_probs.gather(1, tokens[:, None]).mean()),
            float((tokens[:shared] == theirs[:shared]).sum()) / max(1, len(theirs)),
            right,
        )

    def _train(self, row: Rollouts, fork: Fork, options: TOPDConfig) -> None:
        student, teacher = self.pair
        teacher_hidden = teacher.hidden(row)
        guided = guided_windows(as_future(fork, row, self.pair), row, options) if options.guides else None
        if guided is not None and options.guidance_context == "teacher":
            guided = replace(guided, teacher_hidden=teacher.hidden_in_windows(row, guided.branches))
        optimizer = torch.optim.AdamW(self.student.parameters(), self.options.learning_rate, weight_decay=0.0)
        count = guided.targets.guided.any(-1).sum() if guided is not None else row.loss_mask.sum()
        for _ in range(self.options.steps):
            optimizer.zero_grad()
            loss = topd_loss(
                row, student, teacher, teacher_hidden, row.loss_mask.float(), guided, options,
                num_tokens=row.loss_mask.sum(), num_forks=count.clamp(min=1),
            ).loss  # fmt: skip
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    def _row(self, prefix: Tensor, window: Windows) -> Rollouts:
        """The prefix as a prompt and the window as its response."""
        return written_rollouts([prefix], [window.tokens[0][window.mask[0]]], self.tokenizer, window.tokens.device)


def as_future(fork: Fork, row: Rollouts, pair: tuple[DistilledModel, DistilledModel]) -> NearFuture:
    """The fork as the only candidate of a rollout that is its own window."""
    at = torch.zeros(1, dtype=torch.long, device=row.response_ids.device)
    yes = torch.ones(1, dtype=torch.bool, device=at.device)
    length = row.response_ids.shape[1]
    ours = Windows(fork.ours.tokens[:, :length], fork.ours.mask[:, :length])
    transport = near_future_transport(ours, fork.theirs, row, at, at, *pair)
    nothing = torch.zeros(row.response_ids.shape, device=at.device)
    return NearFuture(
        nothing, nothing, nothing, at, at, ours, fork.theirs, True, transport, 0.0, None, yes, yes, ~yes, nothing + 1
    )


def config_of(options: CorrectOptions, arm: str) -> TOPDConfig:
    """The arm's loss. The row is the student's own window, so its contexts are there already."""
    settings: dict[str, Any] = {"guidance_weight": options.guidance_weight, "student_window": "rollout"} | ARMS[arm]
    return TOPDConfig(
        "unused", window_length=options.window_length, bf16=False, use_cpu=not torch.cuda.is_available(), **settings
    )
