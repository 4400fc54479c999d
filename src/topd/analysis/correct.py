"""Local correction (section 5.2, Fig. 5) for any pair: does guidance at a fork move the student towards the teacher?

At one fork of a rollout the student takes M gradient steps on one window alone, each arm from the same weights. Then it
continues the same prefix again. D_OT to the teacher's window measures the effect, but TOPD's targets use the plan that
defines D_OT. Three further measures are not optimized by any loss here: the teacher's likelihood of the new window, the
share of tokens that equal the teacher's, and, for problems with answers, whether the continuation is correct.

The paper's formula (section 3) uses the student's contexts; its section 5.2 uses "the teacher continuation as the local
optimization target". OPD and TOPD run on both windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from topd.algorithm import low_loss_threshold
from topd.analysis.probe import ProbeOptions, measure
from topd.errors import NonFiniteError
from topd.near_future import DistilledModel, LocalModel, Places, Rollouts, Windows
from topd.near_future.model_parts import end_token_ids, padding_id
from topd.near_future.sampling import written_rollouts
from topd.training.losses import Guided, LossInputs, StepLoss, guided_windows, last_parameters
from topd.training.method import Futures, Method
from topd.training.step import Pair, near_future_transport, topd_loss

TOPD = Method(student_window="regenerated")
"""L_traj of section 3 on windows that branch off the row: the student's contexts, the transport's targets."""
OPD = replace(TOPD, guides=False)


@dataclass(frozen=True)
class Arm:
    """A loss at a fork."""

    method: Method  # the loss. L_traj is the same whichever window L_OPD is computed on (our reading).
    # whose continuation L_OPD is computed on: the student's, or the teacher's (section 5.2)
    window: Literal["student", "teacher"] = "student"
    baseline: str = "opd"  # the arm without guidance on the same window


ARMS = {
    "opd": Arm(OPD),
    "topd": Arm(TOPD),
    "opd on teacher": Arm(OPD, "teacher", "opd on teacher"),
    "topd on teacher": Arm(TOPD, "teacher", "opd on teacher"),
    "own tokens": Arm(replace(TOPD, guidance_target="own")),
    "same index": Arm(replace(TOPD, guidance_target="same_index")),
    "teacher's contexts": Arm(replace(TOPD, guidance_context="teacher")),
}
"""OPD and TOPD on both windows; then controls, on the student's window."""


@dataclass(frozen=True)
class CorrectOptions:
    """The settings of the correction, with the defaults of `Method`."""

    window_length: int = Method.window_length  # K
    share: float = Method.candidate_share  # share of positions that are candidates, as in training
    steps: int = 5  # M, 5 in the paper
    learning_rate: float = 1e-4  # of AdamW; the paper does not give it: our choice
    # lambda. L_traj is a mean over guided window positions, as in training. L_OPD is a mean over the window's tokens
    # here, and over all response tokens in training, so the same lambda has less effect here; `guidance_ratio` in the
    # records has the measured ratio.
    guidance_weight: float = Method.guidance_weight
    arms: tuple[str, ...] = tuple(ARMS)  # names of `ARMS`
    seed: int = 0


@dataclass(frozen=True)
class Fork:
    """A position where the futures diverge: prefix [token], and both windows as batches of one."""

    rollout: int
    position: int
    token_loss: float
    prefix: Tensor
    ours: Windows
    theirs: Windows
    distance: float


@dataclass(frozen=True)
class Outcome:
    """The student's window at a fork, compared with the teacher's."""

    window: list[int] = field(repr=False)  # token ids
    distance: float  # D_OT to the teacher's window
    teacher_log_likelihood: float  # mean log p_T of the window's tokens, nats
    agreement: float  # share of positions of the teacher's window with the same token
    right: bool | None  # whether the whole continuation is correct; None if the task has no answers


def find_forks(
    student: DistilledModel, teacher: DistilledModel, batches: Iterable[Rollouts], options: CorrectOptions
) -> list[Fork]:
    """The fork with the highest token loss of each rollout that has one.

    A fork is a candidate with D_OT above the upper quartile of D_OT at the low-loss positions of all rollouts (section
    2.1). The student's window is its greedy continuation of the prefix, as after the steps (section 5.2).
    """
    wanted = ProbeOptions(options.share, (options.window_length,), student_windows=("regenerated",))
    candidates: list[Fork] = []
    low: list[Tensor] = []
    first = 0
    for rollouts in batches:
        scores, groups = measure(student, teacher, rollouts, wanted, groups=("high", "low"))
        low.append(groups["low"].distances[wanted.main])
        high = groups["high"]
        rows, positions = high.places.rows, high.places.positions
        for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            one = torch.tensor([index], device=rows.device)
            candidates.append(
                Fork(first + row, position, float(scores.kl[row, position]), rollouts.prefix(row, position),
                     high.ours["regenerated"][one], high.theirs[one], float(high.distances[wanted.main][index]))
            )  # fmt: skip
        first += len(rollouts)
    threshold = low_loss_threshold(torch.cat(low))  # NaN without any distance: then nothing is a fork
    forks = sorted((fork for fork in candidates if fork.distance > threshold), key=lambda fork: -fork.token_loss)
    best: dict[int, Fork] = {}
    for fork in forks:
        best.setdefault(fork.rollout, fork)
    return [best[rollout] for rollout in sorted(best)]


class Corrector:
    """Trains a student (a transformers model) at a fork and restores its weights.

    `pair`: the same student, and the teacher. `is_right`: (rollout, the whole text after the prompt) -> whether it is
    correct; None: no answers. `prompt_lengths`: [rollout] number of tokens of each prompt; required with `is_right`.
    """

    def __init__(
        self, student: Any, pair: tuple[DistilledModel, DistilledModel], tokenizer: Any, options: CorrectOptions,
        is_right: Callable[[int, str], bool] | None = None, prompt_lengths: list[int] | None = None,
        max_new_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.student, self.pair, self.tokenizer, self.options = student, pair, tokenizer, options
        self.is_right, self.prompt_lengths, self.max_new_tokens = is_right, prompt_lengths, max_new_tokens
        self._start = {name: value.detach().clone() for name, value in student.state_dict().items()}

    def correct(self, fork: Fork, arm: str) -> tuple[Outcome, float | None]:
        """Take M steps of an arm at the fork; return the new outcome, and the `gradient_ratio` before the first step.

        The ratio is None without guidance. Raises `NonFiniteError` if the steps make the student compute NaN.
        """
        loss, guided = self.start(arm, fork)
        optimizer = torch.optim.AdamW(self.student.parameters(), self.options.learning_rate, weight_decay=0.0)
        ratio = None
        for step in range(self.options.steps):
            result = loss(guided, last_parameters(self.pair[0].backbone) if step == 0 else None)
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ratio = result.gradient_ratio if step == 0 else ratio
        outcome = self.outcome(fork)
        self.student.load_state_dict(self._start)
        if not math.isfinite(outcome.distance + outcome.teacher_log_likelihood):
            raise NonFiniteError(
                f"After {self.options.steps} steps of the arm {arm!r} the student computes NaN or infinity at the fork "
                f"of rollout {fork.rollout}. Use a lower learning rate, or --dtype float32."
            )
        return outcome, None if ratio is None else float(ratio)

    @torch.no_grad()
    def outcome(self, fork: Fork) -> Outcome:
        """Continue the fork's prefix with the current student."""
        teacher = self.pair[1]
        ends = end_token_ids(self.student.generation_config, self.tokenizer)
        source = LocalModel(self.student, padding_id(self.tokenizer), ends)
        longest = max(self.options.window_length, self.max_new_tokens if self.is_right else 0)
        whole = source.continue_([fork.prefix], longest)
        window = whole.first(self.options.window_length)
        row = self._row(fork.prefix, window)
        distance = self._look(replace(fork, ours=window), row).distance
        states = teacher.hidden(row)[0][: int(window.mask.sum())]
        log_probs = teacher.head().logits(states).log_softmax(-1)
        tokens = window.tokens[0][window.mask[0]]
        theirs = fork.theirs.tokens[0][fork.theirs.mask[0]]
        shared = min(len(tokens), len(theirs))
        right = None
        if self.is_right is not None and self.prompt_lengths is not None:
            text = torch.cat([fork.prefix[self.prompt_lengths[fork.rollout] :], whole.tokens[0][whole.mask[0]]])
            right = self.is_right(fork.rollout, self.tokenizer.decode(text, skip_special_tokens=True))
        agreement = float((tokens[:shared] == theirs[:shared]).sum()) / max(1, len(theirs))
        log_likelihood = float(log_probs.gather(1, tokens[:, None]).mean())
        return Outcome(tokens.tolist(), float(distance), log_likelihood, agreement, right)

    def start(self, arm: str, fork: Fork) -> tuple[Callable[..., StepLoss], Guided | None]:
        """The loss of an arm at a fork as a function of the guided windows (None: L_OPD alone), and those windows."""
        (student, teacher), weight = self.pair, self.options.guidance_weight
        method = replace(ARMS[arm].method, window_length=self.options.window_length, guidance_weight=weight)
        method = replace(method, guides=method.guides and weight > 0)
        row = self._row(fork.prefix, fork.theirs if ARMS[arm].window == "teacher" else fork.ours)
        states = teacher.prefill(row, keep_prefix=False).states
        guided = guided_windows(self._look(fork, row), method) if method.guides else None
        if guided is not None and method.guidance_context == "teacher":
            guided = replace(guided, teacher_hidden=teacher.hidden_in_windows(row, guided.branches))
        one = torch.ones((), device=row.response_ids.device)

        def loss(guided: Guided | None, measured: list[nn.Parameter] | None = None) -> StepLoss:
            inputs = LossInputs(states, row.loss_mask.sum(), None, guided, one, measured)
            return topd_loss(row, student, teacher, inputs, method)

        return loss, guided

    def _look(self, fork: Fork, row: Rollouts) -> Futures:
        """The futures of the fork, as the only place of a rollout whose prompt is the prefix."""
        start = Places(row, *torch.zeros(2, 1, dtype=torch.long, device=row.response_ids.device))
        transport = near_future_transport(start, fork.ours, fork.theirs, Pair(*self.pair), Method())
        return Futures(start, fork.ours, fork.theirs, transport)

    def _row(self, prefix: Tensor, window: Windows) -> Rollouts:
        """A rollout with the prefix as prompt and the window as response."""
        return written_rollouts([prefix], [window.tokens[0][window.mask[0]]], self.tokenizer, window.tokens.device)
