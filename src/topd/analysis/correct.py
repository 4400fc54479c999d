"""Does guidance at one fork bring the student back? Local correction (section 5.2, Fig. 5) for any pair.

At one fork of a rollout the student takes M gradient steps on one window alone, each arm from the same weights; then it
continues the same prefix again. D_OT to the teacher's window shows how near it came, but TOPD's own targets use the
plan that defines D_OT. So three measures that no loss here optimises are taken too: the teacher's likelihood of the new
window, the share of tokens that equal the teacher's, and, where problems have answers, whether the continuation ends
right.

On which window? The paper's formula (section 3) has the student's contexts; its section 5.2 uses "the teacher
continuation as the local optimization target". OPD and TOPD are run on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from topd.algorithm.candidates import PAPER_SHARE
from topd.analysis.probe import ProbeOptions, measure
from topd.analysis.probe_summary import ROUNDING
from topd.near_future import DistilledModel, LocalModel, Places, Rollouts, Windows
from topd.near_future.generation import end_token_ids, padding_id
from topd.near_future.sampling import written_rollouts
from topd.training.futures import Futures
from topd.training.guidance import Guided, guided_windows
from topd.training.losses import LossInputs, StepLoss, last_parameters
from topd.training.method import Method
from topd.training.step import Pair, futures, topd_loss


@dataclass(frozen=True)
class Arm:
    """A loss at a fork.

    Attributes:
        window: whose continuation L_OPD is taken on: the student's, or the teacher's (section 5.2).
        settings: of `Method`. L_traj stays as section 3 has it: the student's contexts and the transport's
            targets, whichever window L_OPD is taken on (our reading).
        baseline: the arm without guidance on the same window.
    """

    window: Literal["student", "teacher"] = "student"
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: str = "opd"


ARMS = {
    "opd": Arm(settings={"guidance_weight": 0.0}),
    "topd": Arm(),
    "opd on teacher": Arm("teacher", {"guidance_weight": 0.0}, "opd on teacher"),
    "topd on teacher": Arm("teacher", baseline="opd on teacher"),
    "own tokens": Arm(settings={"guidance_target": "own"}),
    "same index": Arm(settings={"guidance_target": "same_index"}),
    "teacher's contexts": Arm(settings={"guidance_context": "teacher"}),
}
"""OPD and TOPD on either window; then controls, on the student's window."""


@dataclass(frozen=True)
class CorrectOptions:
    """Attributes:
    window_length: K.
    share: of positions that are candidates, as in training.
    steps: M; the paper takes 5.
    learning_rate: of AdamW; the paper does not give it, our choice.
    guidance_weight: lambda, by default that of training. Its scale is the same too: L_traj is a mean over guided window
        positions. L_OPD is a mean over the window's tokens here, and over all response tokens in training, so the same
        lambda is weaker here; `guidance_ratio` in the records says what it amounts to.
    arms: names of `ARMS`.
    """

    window_length: int = 50
    share: float = PAPER_SHARE
    steps: int = 5
    learning_rate: float = 1e-4
    guidance_weight: float = Method.guidance_weight
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


def find_forks(
    student: DistilledModel, teacher: DistilledModel, batches: Iterable[Rollouts], options: CorrectOptions
) -> list[Fork]:
    """The fork with the highest token loss of each rollout that has one.

    A fork is a candidate whose D_OT is above the upper quartile of D_OT at the low-loss positions of all the rollouts
    (section 2.1). The student's window is its greedy continuation of the prefix, as after the steps (section 5.2).
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
    distances = torch.cat(low)
    distances = distances[distances.isfinite()]
    if len(distances) == 0:
        return []
    threshold = float(distances.quantile(0.75)) + ROUNDING
    best: dict[int, Fork] = {}
    for fork in candidates:
        known = best.get(fork.rollout)
        if fork.distance > threshold and (known is None or fork.token_loss > known.token_loss):
            best[fork.rollout] = fork
    return list(best.values())


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

    def correct(self, fork: Fork, arm: str) -> tuple[Outcome, float | None]:
        """M steps of an arm on the fork's window, then the window again; and see `_train`."""
        ratio = self._train(fork, arm)
        outcome = self.outcome(fork)
        self.student.load_state_dict(self._start)
        return outcome, ratio

    @torch.no_grad()
    def outcome(self, fork: Fork) -> Outcome:
        """Where the student goes from the fork's prefix now."""
        teacher = self.pair[1]
        ends = end_token_ids(self.student.generation_config, self.tokenizer)
        source = LocalModel(self.student, padding_id(self.tokenizer), ends)
        longest = max(self.options.window_length, self.max_new_tokens if self.is_right else 0)
        whole = source.continue_([fork.prefix], longest)
        window = Windows(whole.tokens[:, : self.options.window_length], whole.mask[:, : self.options.window_length])
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
        return Outcome(
            tokens.tolist(),
            float(distance),
            float(log_probs.gather(1, tokens[:, None]).mean()),
            float((tokens[:shared] == theirs[:shared]).sum()) / max(1, len(theirs)),
            right,
        )

    def start(self, arm: str, fork: Fork) -> tuple[Callable[..., StepLoss], Guided | None]:
        """An arm's loss at a fork as a function of the guided windows (None: L_OPD alone), and the arm's windows."""
        student, teacher = self.pair
        method = method_of(self.options, arm)
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

    def _train(self, fork: Fork, arm: str) -> float | None:
        """Take the steps; `gradient_ratio` before the first, None without guidance."""
        loss, guided = self.start(arm, fork)
        optimizer = torch.optim.AdamW(self.student.parameters(), self.options.learning_rate, weight_decay=0.0)
        ratio = None
        for step in range(self.options.steps):
            optimizer.zero_grad()
            result = loss(guided, last_parameters(self.pair[0].backbone) if step == 0 else None)
            result.loss.backward()
            optimizer.step()
            ratio = result.gradient_ratio if step == 0 else ratio
        optimizer.zero_grad()
        return None if ratio is None else float(ratio)

    def _look(self, fork: Fork, row: Rollouts) -> Futures:
        """The fork's futures as those of the only place in a rollout that has only the prefix before it."""
        start = Places(row, *torch.zeros(2, 1, dtype=torch.long, device=row.response_ids.device))
        return futures(start, fork.ours, fork.theirs, Pair(*self.pair), Method())

    def _row(self, prefix: Tensor, window: Windows) -> Rollouts:
        """The prefix as a prompt and the window as its response."""
        return written_rollouts([prefix], [window.tokens[0][window.mask[0]]], self.tokenizer, window.tokens.device)


def method_of(options: CorrectOptions, arm: str) -> Method:
    """The arm's loss. L_traj's windows branch off the row, whichever window the row holds."""
    settings: dict[str, Any] = {"guidance_weight": options.guidance_weight, "student_window": "regenerated"}
    settings |= ARMS[arm].settings
    return Method(window_length=options.window_length, guides=settings["guidance_weight"] > 0, **settings)
