"""Part of `TOPDTrainer`: accuracy on held-out problems, at every evaluation, from the records of the responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import Trainer

from topd.errors import TOPDError
from topd.evaluation.accuracy import accuracy_interval
from topd.evaluation.benchmarks import ProblemSet, load_benchmark, spread, text_of
from topd.evaluation.engines import LocalEngine, Request, Response, Sampling, check_context, ids_of
from topd.evaluation.equivalence import check_installed
from topd.evaluation.run import SAMPLE_STRIDE, record_of, requests_of
from topd.loading.sharding import held_whole
from topd.near_future.model_parts import NEUTRAL
from topd.runs.files import append_records
from topd.runs.records import EVAL_FILE
from topd.runs.rollback import random_states

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

LIMITED_BY = "max_completion_length"
RECORD_VERSION = 1
"""Of the responses that are kept."""
KEPT_RESPONSES = 8
"""Responses kept of each evaluation."""

TIMES, AT_LEAST, TAIL = 4, 100, 4000
"""A loop: the end of a response is one passage at least four times in a row, over at least 100 characters. A passage of
up to 1,000 characters is found. Our choice."""


@dataclass(frozen=True)
class HeldOut:
    """The problems that the student answers at each evaluation, and how, which is `topd eval`'s way."""

    problem_set: ProblemSet
    samples: int  # responses per problem
    sampling: Sampling
    chat: bool  # whether text prompts go through the chat template as a user message

    @classmethod
    def of(cls, problem_set: ProblemSet, args: TOPDConfig, tokenizer: Any, config: Any) -> HeldOut:
        """How a run answers these problems; tokenizer and config are the student's.

        Raises `ContextError` if the longest problem and a response do not fit the student's context.
        """
        template_options: Any = args.chat_template_kwargs or {}
        sampling = Sampling(
            temperature=args.eval_temperature,
            max_new_tokens=args.max_completion_length or problem_set.max_new_tokens,
            chat_template_kwargs=dict(template_options),
        )
        chat = tokenizer.chat_template is not None and problem_set.rule != "embedded"
        held_out = cls(problem_set, args.eval_samples, sampling, chat)
        check_context(held_out.requests(range(len(held_out))), sampling, tokenizer, config, LIMITED_BY)
        return held_out

    def __len__(self) -> int:
        return len(self.problem_set.problems)

    def requests(self, places: Sequence[int]) -> list[Request]:
        """All requests for the problems at these places."""
        return requests_of(self.problem_set, places, self.samples, self.chat)


def problems_of(args: TOPDConfig) -> ProblemSet | None:
    """The problems that the options name, or None. Raises `TOPDError` where they cannot be read or judged."""
    if args.eval_benchmark is None:
        return None
    problem_set = load_benchmark(args.eval_benchmark, limit=args.eval_benchmark_limit, option="eval_benchmark")
    if problem_set.rule == "math":
        check_installed()
    return problem_set


def check_best_metric(args: TOPDConfig, eval_dataset: Any) -> None:
    """Raise `TOPDError` if the best model is to be chosen by a loss, and no loss is measured."""
    if eval_dataset is None and (args.metric_for_best_model or "").removeprefix("eval_") == "loss":
        raise TOPDError(
            "The best model is chosen by the evaluation loss, but there is no eval_dataset (topd train: "
            "--eval_data). Set metric_for_best_model to accuracy, or pass a dataset."
        )


class HeldOutAccuracy(Trainer):
    """See the module. Its metrics are part of what `evaluate` returns and logs."""

    accelerator: Accelerator
    args: TOPDConfig
    model: Any
    model_wrapped: Any
    use_vllm: bool
    _folder: Any
    _tokenizer: Any
    _autocast: Any
    _held_out: HeldOut | None = None
    _engine: LocalEngine | None = None
    _evaluating = False
    _due: str | None = None  # prefix of the metrics of an evaluation whose problems are not answered yet

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in TRL; of no batches where there are only problems to answer."""
        if self._held_out is not None and eval_dataset is None and self.eval_dataset is None:
            return []
        return super().get_eval_dataloader(eval_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in transformers. The problems are answered once, also with several datasets."""
        if self._evaluating:  # one of several datasets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._evaluating, self._due = True, metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating, self._due = False, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, then the problems, whose metrics join those of the dataset."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self._held_out is None or self._due is None:
            return output
        prefix, self._due = self._due, None
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._answered(self._held_out).items()})
        return output._replace(num_samples=output.num_samples + len(self._held_out) * self._held_out.samples)

    def _answered(self, held_out: HeldOut) -> dict[str, float]:
        """Answer all problems, and keep a few responses. The random states of training do not change."""
        put_back = random_states(self.accelerator.device)
        try:
            mine = self._records(held_out)
        finally:
            put_back()
        by_problem = sorted(gather_object(mine), key=lambda numbered: divmod(numbered[0], SAMPLE_STRIDE)[::-1])
        records = [record for _, record in by_problem]
        if self.accelerator.is_main_process:
            append_records(kept_responses(records, held_out, self.state.global_step), self._folder / EVAL_FILE)
        return figures(records, held_out.samples)

    def _records(self, held_out: HeldOut) -> list[tuple[int, dict[str, Any]]]:
        """The number and the record of each response of this process, which has its share of the problems."""
        count, each, here = len(held_out), self.accelerator.num_processes, self.accelerator.process_index
        places = range(here, count, each)
        even = [place % count for place in range(here, -(-count // each) * each, each)]
        requests = held_out.requests(even if self.use_vllm else places)
        return [
            (number, record_of(held_out.problem_set, number, response))
            for batch in self._responses(requests, held_out.sampling)
            for number, response in batch
            if number % SAMPLE_STRIDE in places
        ]

    def _responses(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """As `Engine.respond`: of vLLM, or of the student itself, whole in every process."""
        if self.use_vllm:
            yield from self._by_vllm(requests, sampling)
            return
        with self._autocast(), held_whole(self.model_wrapped, self.accelerator):
            student = self.accelerator.unwrap_model(self.model)
            if self._engine is None or self._engine.model is not student:
                self._engine = LocalEngine(student, self._tokenizer, self.args.eval_batch_size, LIMITED_BY)
            yield from self._engine.respond(requests, sampling)

    def _by_vllm(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """As `Engine.respond`, of the vLLM that training samples with; a sample of every problem at a time.

        All processes call it equally often and with equally many prompts: a server's responses are dealt out by number.
        """
        trainer: Any = self
        trainer._last_loaded_step = -1  # the weights may be others than at the last rollout: those of the best step
        settings: dict[str, Any] = {name: NEUTRAL[name] for name in ("top_k", "min_p", "repetition_penalty")} | {
            "temperature": sampling.temperature, "top_p": sampling.top_p, LIMITED_BY: sampling.max_new_tokens,
            "generation_kwargs": {},
        }  # fmt: skip
        for _, group in groupby(requests, key=lambda request: request.number // SAMPLE_STRIDE):
            batch = list(group)
            prompts = [ids_of(request, self._tokenizer, sampling) for request in batch]
            with patch.multiple(trainer.vllm_generation, **settings):  # instead of the rollouts' settings
                responses = map(list, trainer._generate_single_turn(prompts, None, {}))
            found = []
            for request, ids in zip(batch, responses, strict=True):
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                truncated = not set(ids[-1:]) & set(trainer.eos_token_ids)
                found.append((request.number, Response(str(text), truncated, len(ids))))
            yield found


def figures(records: Sequence[dict[str, Any]], samples: int) -> dict[str, float]:
    """Accuracy with its 95 % interval over problems, and what the responses look like. Shares are from 0 to 1.

    `records`: as `record_of` makes them, [problem x sample], the samples of a problem next to each other.
    """
    right = np.array([record["right"] for record in records], dtype=float).reshape(-1, samples)
    found = accuracy_interval([right])
    responses = {
        "ended": [not record["truncated"] for record in records],
        "mean_length": [record["tokens"] for record in records],
        "repeated": [ends_in_a_loop(record["text"]) for record in records],
    }
    accuracy = {"accuracy": found.mean, "accuracy_low": found.low, "accuracy_high": found.high}
    return accuracy | {name: float(np.mean(values)) for name, values in responses.items()}


def ends_in_a_loop(text: str) -> bool:
    """Whether a response ends in one passage over and over; see `TIMES`."""
    tail = text.rstrip()[-TAIL:]
    for period in range(1, len(tail) // TIMES + 1):
        span = max(TIMES * period, AT_LEAST)
        if span > len(tail):
            return False
        if tail[-span:-period] == tail[period - span :]:
            return True
    return False


def kept_responses(records: Sequence[dict[str, Any]], held_out: HeldOut, step: int) -> list[dict[str, Any]]:
    """The first response to each of a few problems, spread over the set and the same at each evaluation."""
    first = list(zip(held_out.problem_set.problems, records[:: held_out.samples], strict=True))
    return [
        {
            "version": RECORD_VERSION, "step": step, "problem": text_of(problem.prompt), "response": record["text"],
            "answer": problem.answer, "right": record["right"], "ended": not record["truncated"],
        }
        for problem, record in spread(first, KEPT_RESPONSES)
    ]  # fmt: skip
