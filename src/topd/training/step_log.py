"""Part of `TOPDTrainer`: what a step took and found, for the log, the audit records and the budget."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import DistillationTrainer

from topd.logs import get_logger
from topd.near_future import Rollouts
from topd.runs.console import STAGES, Stopwatch
from topd.runs.files import append_records, write_json
from topd.runs.records import AUDIT_FILE
from topd.training.budget import CandidateBudget, budget_message
from topd.training.config import TOPDConfig
from topd.training.losses import Guided, own_share
from topd.training.method import Method, NearFuture

logger = get_logger(__name__)

RECORD_VERSION = 1
"""Of audit records."""
AUDIT_ROLLOUTS = 4
"""Rollouts in each audit record."""


class StepLog(DistillationTrainer):
    """Times the stages of each step, and turns what the step found into metrics and records."""

    args: TOPDConfig
    teacher_model: Any
    _budget: CandidateBudget | None
    _folder: Any
    _stage: Stopwatch
    _guidance_loss = 0.0
    _outside_top_k = 0.0
    _step_size = (0.0, 0.0, 0.0)  # response tokens, rollouts, candidates
    _micro_batches: int
    _generations: int
    _prompts_per_generation: int
    _spent: dict[str, float]  # seconds by stage, since the rollouts were sampled
    _sampled_here = False  # whether this start of the run sampled them
    _warned = False
    _teacher_names: Sequence[str] = ()  # of several, in the order of `Rollouts.teacher`

    def _warn_without_distances(self, future: NearFuture) -> None:
        """Say once that nothing is guided, because no candidate has a transport distance."""
        distances = self._gather_ragged(future.candidates.distance)
        if self._warned or len(distances) == 0 or bool(distances.isfinite().any()):
            return
        self._warned = True
        hint = "raise entropic_epsilon or use transport_solver=exact" if self.args.transport_solver != "exact" else (
            "check that both models' embeddings are finite and that windows are not empty"
        )  # fmt: skip
        logger.warning(
            f"Step {self.state.global_step + 1}: no candidate has a transport distance, so nothing is a fork and the "
            f"step is plain OPD; {hint}. This is reported once."
        )

    def _gather_ragged(self, values: Tensor) -> Tensor:
        """Values of all processes, however many each has."""
        if self.accelerator.num_processes == 1:
            return values
        padded = self.accelerator.pad_across_processes(values, pad_index=torch.nan)
        return self.accelerator.gather(padded)  # NaN marks what is not there, as it marks unknown distances

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        before = sum(self._stage.seconds.values())
        if self._step % self._micro_batches == 0 or not self._sampled_here:
            self._sampled_here, self._spent = self._step % self._micro_batches == 0, defaultdict(float)
        with self._stage("whole"):
            output: Tensor = super().training_step(model, inputs, num_items_in_batch)
        whole = self._stage.seconds.pop("whole")
        self._stage.seconds["backward"] += whole - (sum(self._stage.seconds.values()) - before)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._finish_step_metrics()
        return output

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._stage.paused():
            return super().evaluation_loop(*args, **kwargs)

    def _record(self, future: NearFuture, guided: Guided | None, rollouts: Rollouts, method: Method) -> None:
        for name, value in near_future_metrics(future, guided, rollouts, method, self._gather_ragged).items():
            self._metrics["train"][name].append(value)
        due = self.args.audit_steps and self._generations % self.args.audit_steps == 0
        if due and self.accelerator.is_main_process:
            records = audit_records(
                rollouts, future, self._tokenizer,
                step=self.state.global_step + 1, method=self.args.method, limit=AUDIT_ROLLOUTS,
                teachers=self._teacher_names,
            )  # fmt: skip
            append_records(records, self._folder / AUDIT_FILE)

    def _finish_step_metrics(self) -> None:
        seconds = self._stage.take()
        for name, value in seconds.items():
            self._spent[name] += value
        if self._sampled_here and self._step % self._micro_batches == 0:
            rate = self._prompts_per_generation / sum(self._spent.values())
            self._metrics["train"]["rollouts_per_second"].append(rate)
            if self._budget is not None:
                self._keep_to_budget(self._budget, self._spent)
        for name in STAGES:
            if name in self._spent:  # 0 in updates that use the rollouts again
                self._metrics["train"][f"seconds/{name}"].append(seconds.get(name, 0.0))
        if self.args.guides:
            self._metrics["train"]["guidance/loss"].append(self._guidance_loss)
            self._guidance_loss = 0.0
        if self.teacher_model is None:
            self._metrics["train"]["token_loss/outside_top_k"].append(self._outside_top_k)
            self._outside_top_k = 0.0

    def _keep_to_budget(self, budget: CandidateBudget, seconds: dict[str, float]) -> None:
        """Tell the budget what a batch of rollouts took, on average over processes, so that all decide alike."""
        numbers = torch.tensor([*(seconds.get(name, 0.0) for name in STAGES), *self._step_size], dtype=torch.float64)
        mean = self.accelerator.reduce(numbers.to(self.accelerator.device), reduction="mean").tolist()
        was_measuring = budget.measuring
        budget.record(dict(zip(STAGES, mean, strict=False)), *mean[len(STAGES) :])
        if budget.model is None:
            return
        tokens, rollouts, candidates = mean[len(STAGES) :]
        self._metrics["train"]["budget/predicted_overhead"].append(budget.model.overhead(candidates / tokens))
        if was_measuring and self.accelerator.is_main_process:
            tqdm.write(f"topd: {budget_message(budget, tokens / rollouts)}")  # above the progress bar


def near_future_metrics(
    future: NearFuture, guided: Guided | None, rollouts: Rollouts, method: Method, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """What looking ahead found, over all processes; docs/metrics.md explains the keys. `gather` may pad with NaN."""
    loss = _known(gather(future.look.token_loss[rollouts.loss_mask.bool()]))
    distance = _known(gather(future.candidates.distance))
    found = future.candidates
    from_student = 0 if method.student_window == "rollout" else int(found.ours.mask.sum())
    generated_tokens = int(found.theirs.mask.sum()) + from_student
    n_rollouts, n_candidates, n_forks, generated = gather(
        torch.tensor(
            [[len(rollouts), len(future.candidates), int(future.fork.sum()), generated_tokens]],
            device=loss.device,
            dtype=torch.float64,
        )
    ).sum(0)
    metrics = {
        "token_loss/mean": loss.mean(),
        **{f"token_loss/q{q}": _quantile(loss, q / 100) for q in (50, 90, 99)},
        "candidates/per_rollout": n_candidates / n_rollouts,
        **{f"distance/q{q}": _quantile(distance, q / 100) for q in (25, 50, 75)},
        "forks/per_rollout": n_forks / n_rollouts,
        "forks/threshold": torch.tensor(future.threshold),
        "windows/tokens": generated,
    }
    if len(distance):
        metrics["false_alarm_share"] = 1 - n_forks / len(distance)
    if future.look.low_loss is not None:
        metrics["forks/low_loss_q50"] = _quantile(_known(gather(future.look.low_loss.distance)), 0.5)
    if guided is not None:
        share = _known(gather(own_share(guided)))
        metrics["guidance/positions"] = torch.tensor(float(len(share)))
        if guided.context == "student":
            metrics["guidance/own_token_share"] = share.mean()
    numbers = torch.stack([value.to(loss.device, torch.float64) for value in metrics.values()])
    return dict(zip(metrics, numbers.tolist(), strict=True))  # the host waits for the device once


def _known(values: Tensor) -> Tensor:
    return values[~values.isnan()]


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear interpolation; NaN of nothing. (torch.quantile is limited to 16 million values.)"""
    if len(values) == 0:
        return torch.tensor(torch.nan)
    ordered = values.float().sort().values
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def audit_records(
    rollouts: Rollouts,
    future: NearFuture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    method: str,
    limit: int,
    teachers: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One record per rollout: prompt, tokens with their loss (nats), and every candidate with both windows.

    `teachers`: names of several, in the order of `Rollouts.teacher`.
    """

    def texts(ids: Tensor) -> list[str]:
        return [str(tokenizer.decode([token])) for token in ids.tolist()]

    records = []
    for row in range(min(limit, len(rollouts))):
        mask = rollouts.response_mask[row].bool()
        tokens, losses = texts(rollouts.response_ids[row][mask]), future.look.token_loss[row][mask]
        candidates = (future.candidates.places.rows == row).nonzero().squeeze(-1).tolist()
        teacher = {} if rollouts.teacher is None else {"teacher": teachers[int(rollouts.teacher[row])]}
        records.append(
            {
                "version": RECORD_VERSION,
                "step": step,
                "method": method,
                **teacher,
                "prompt": tokenizer.decode(rollouts.prefix(row, 0)),
                "rollout": {"tokens": tokens, "token_loss": [_number(loss) for loss in losses]},
                "candidates": [candidate_record(future, index, texts) for index in candidates],
            }
        )
    return records


def candidate_record(future: NearFuture, index: int, texts: Callable[[Tensor], list[str]]) -> dict[str, Any]:
    """One candidate in an audit record, without the padding of its windows. `texts`: of token ids [token]."""
    found = future.candidates
    row, position = int(found.places.rows[index]), int(found.places.positions[index])
    ours, theirs = (side.tokens[index][side.mask[index]] for side in (found.ours, found.theirs))
    plan, converged = found.transport.plan[index], bool(found.transport.converged[index])
    return {
        "position": position,
        "token": texts(found.places.tokens[[index]])[0],
        "token_loss": _number(future.look.token_loss[row, position]),
        "distance": _number(found.distance[index]) if converged else None,
        "threshold": _number(future.threshold),
        "fork": bool(future.fork[index]),
        "decision": "guided" if future.guided[index] else "capped" if future.capped[index] else "none",
        "weight": _number(future.weights[row, position]),
        "student_window": texts(ours),
        "teacher_window": texts(theirs),
        "plan": [[i, j, _number(plan[i, j])] for i, j in plan.nonzero().tolist() if i < len(ours) and j < len(theirs)],
    }


def _number(value: Tensor | float) -> float:
    return round(float(value), 6)


def save_options(args: TOPDConfig) -> None:
    """Write the method's options to `topd_config.json` in the output folder, for the report."""
    names = set(asdict(args)) & set(TOPDConfig.__annotations__) | {"learning_rate", "seed", "max_completion_length"}
    folder = Path(str(args.output_dir))
    options = {name: getattr(args, name) for name in sorted(names)}
    write_json(options, folder / "topd_config.json")
