"""The learning curve of a study's run."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from topd.study.config import StudyPlan
from topd.study.tasks import Task


class Curve(TrainerCallback):
    """Greedy accuracy by steps, generated tokens and seconds of training, without the time for answering.

    Without a GPU, seconds are CPU time of one thread, so that other load on the machine does not count.
    """

    def __init__(self, plan: StudyPlan, task: Task, tokenizer: Any, asks: bool = True) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = self.resumed = 0.0
        self.task, self.tokenizer, self.every = task, tokenizer, plan.curve_every
        self.problems = task.curve() if asks else []
        self.clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.add_point(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += self.clock() - self.resumed
        if state.global_step % self.every == 0:
            self.add_point(state, kwargs["model"])
        self.resumed = self.clock()

    def add_point(self, state: Any, model: Any) -> None:
        """Add a point, if the curve has problems."""
        if self.problems:
            right = self.task.right(model, self.tokenizer, self.problems, sampled=False)
            accuracy = sum(right) / len(right)
            self.points.append({"step": state.global_step, "seconds": self.seconds, "accuracy": accuracy})
        self.resumed = self.clock()

    def with_tokens(self, log: list[dict[str, Any]]) -> list[dict[str, float]]:
        """The points, each with the tokens processed up to its step (0 before the first)."""
        tokens = {entry["step"]: float(entry["num_tokens"]) for entry in log if "num_tokens" in entry}
        return [point | {"tokens": tokens.get(int(point["step"]), 0.0)} for point in self.points]
