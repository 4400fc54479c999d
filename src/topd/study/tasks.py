"""What a study trains on and evaluates: the embedded task, or your own data and benchmark."""

import json
from typing import Any

from topd.embedded.task import make_problems
from topd.errors import TOPDError
from topd.runs.provenance import digest
from topd.study.config import StudyPlan


class EmbeddedTask:
    """Arithmetic in words: prompts for training, and problems that no model was trained on."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan

    def digest(self) -> str | None:
        """None: the settings say all."""
        return None

    def prompts(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Rows with `prompt`, drawn by seed; disjoint from the problems."""
        problems = make_problems(count, seed=seed, held_out=False, level=self.plan.level)
        return [{"prompt": problem.prompt} for problem in problems]

    def held_out(self) -> list[Any]:
        return make_problems(self.plan.held_out, seed=1_000_000, held_out=True, level=self.plan.level)

    def tuning(self) -> list[Any]:
        """Problems for tuning, disjoint from the held-out ones."""
        asked = {problem.prompt for problem in self.held_out()}
        count = self.plan.held_out + self.plan.tune_problems
        others = make_problems(count, seed=2_000_000, held_out=True, level=self.plan.level)
        return [problem for problem in others if problem.prompt not in asked][: self.plan.tune_problems]

    def curve(self) -> list[Any]:
        return make_problems(self.plan.curve_problems, seed=3_000_000, held_out=True, level=self.plan.level)

    def right(self, model: Any, tokenizer: Any, problems: list[Any], *, sampled: bool) -> list[bool]:
        """Whether each problem is answered correctly, greedily or by one reproducible sample.

        Greedy decoding does not touch torch's random state, because learning curves run during training.
        """
        import torch

        from topd.evaluation.embedded import correct_answers

        if sampled:
            torch.manual_seed(0)
        return correct_answers(model, tokenizer, problems, temperature=float(sampled))


class OwnTask:
    """The same with prompts of a file or the Hub, and problems of any benchmark of `topd eval`, judged as there.

    The learning curve uses the first held-out problems.
    """

    def __init__(self, plan: StudyPlan) -> None:
        from topd.evaluation.benchmarks import load_benchmark, question
        from topd.loading.data import load_prompts

        self.plan = plan
        self.rows = [{"prompt": row["prompt"]} for row in load_prompts(str(plan.data))]
        self.held = load_benchmark(str(plan.benchmark), limit=plan.held_out, rule=plan.rule)
        self.tuned = plan.tune_benchmark and load_benchmark(
            plan.tune_benchmark, limit=plan.tune_problems, rule=plan.rule
        )
        self.rules = {each.id: found.rule for found in (self.held, self.tuned) if found for each in found.problems}
        tuning = {question(problem.prompt) for problem in self.tuning()}
        held_out = {question(problem.prompt) for problem in self.held.problems}
        trained = {question(row["prompt"]) for row in self.rows}
        for common, where in (
            (trained & (held_out | tuning), f"{plan.data} are problems of the benchmarks"),
            (held_out & tuning, f"{plan.tune_benchmark} are held out too"),
        ):
            if common:
                raise TOPDError(f"{len(common)} prompts of {where}, such as {min(common)[:80]!r}. Take them out.")
        if (count := len(self.held.problems)) < plan.held_out:
            raise TOPDError(f"{plan.benchmark} has fewer problems than {plan.held_out}: write held_out: {count}.")

    def digest(self) -> str | None:
        """Of all prompts, problems and answers, which the files may have others of later."""
        problems = [*self.held_out(), *self.tuning()]
        return digest([*(json.dumps(row["prompt"]) for row in self.rows), *(problem.id for problem in problems)])

    def prompts(self, count: int, seed: int) -> list[dict[str, Any]]:
        """All rows in an order drawn by seed, repeated in another order if there are too few."""
        import numpy as np

        rng = np.random.default_rng(seed)
        drawn: list[int] = []
        while len(drawn) < count:
            drawn += rng.permutation(len(self.rows)).tolist()
        return [self.rows[place] for place in drawn[:count]]

    def held_out(self) -> list[Any]:
        return list(self.held.problems)

    def tuning(self) -> list[Any]:
        return list(self.tuned.problems) if self.tuned else []

    def curve(self) -> list[Any]:
        return list(self.held.problems[: self.plan.curve_problems])

    def right(self, model: Any, tokenizer: Any, problems: list[Any], *, sampled: bool) -> list[bool]:
        from topd.evaluation.answers import verdict
        from topd.evaluation.engines import LocalEngine, Request, Sampling, as_chat

        greedy = {} if sampled else {"temperature": 0.0}
        sampling = Sampling(**{"max_new_tokens": self.held.max_new_tokens} | self.plan.sampling | greedy)
        chat = tokenizer.chat_template is not None
        requests = [Request(place, as_chat(problem.prompt, chat)) for place, problem in enumerate(problems)]
        engine = LocalEngine(model, tokenizer, together=64, limited_by="sampling.max_new_tokens")
        engine.check(requests, sampling)
        was_training = model.training
        model.eval()
        answers = {number: response for batch in engine.respond(requests, sampling) for number, response in batch}
        model.train(was_training)
        texts = [answers[place].text for place in range(len(problems))]
        return [verdict(t, p.answer, self.rules[p.id]).right for t, p in zip(texts, problems, strict=True)]


Task = EmbeddedTask | OwnTask


def task_of(plan: StudyPlan) -> Task:
    """The plan's task. Raises `TOPDError` if data cannot be read, or training prompts are among the problems."""
    return EmbeddedTask(plan) if plan.data is None else OwnTask(plan)
