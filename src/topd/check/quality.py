"""Checks with both models loaded: does the teacher know more, and are the metrics of a few rollouts plausible?"""

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from topd.algorithm import score_tokens
from topd.check.findings import Finding, fails, ok, warns
from topd.check.setup import Setup
from topd.embedded.task import read_problem
from topd.errors import install
from topd.evaluation.answers import Rule, verdict
from topd.evaluation.benchmarks import spread, text_of
from topd.lm.pair import DATA
from topd.near_future import Rollouts
from topd.near_future.model_parts import left_padded, padding_id
from topd.near_future.sampling import local_pair, sample_rollouts
from topd.near_future.ways import notice_of, ways_of

JUDGED: dict[Rule, str] = {
    "embedded": "the last words of each, as in the embedded task",
    "gsm8k": "the number after the last #### of each",
    "math": "the last \\boxed{} of each, as mathematics",
}
"""What part of a response is judged, by rule."""


def _sampled(setup: Setup, student: Any, count: int, max_new_tokens: int) -> Rollouts:
    """The student's responses to prompts spread over the data, with what the teacher reads before them."""
    rows = spread(list(setup.sample), count)
    prompts, temperature = _prompts(setup.sample, rows, student), setup.config.temperature
    rollouts = sample_rollouts(
        student, setup.student.tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature
    )
    if not setup.prompted:
        return rollouts
    ids, mask = left_padded(_prompts(setup.teacher_sample, rows, student), padding_id(setup.student.tokenizer))
    return replace(rollouts, teacher_prompt_ids=ids, teacher_prompt_mask=mask)


def _prompts(sample: Mapping[int, list[int]], rows: list[int], model: Any) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    return [torch.tensor(sample[row], device=device) for row in rows]


def ways(student: Any, teacher: Any) -> Finding:
    """Which fast ways of running both models are exact, found by trying them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the finding reports it
        notices = [notice_of(model, ways_of(model)) for model in (student, teacher)]
    shown = [notice or "windows over one prefix, guided windows in one row" for notice in notices]
    found = f"student: {shown[0]}; teacher: {shown[1]}"
    return warns(found, "Results do not change; steps take longer.") if any(notices) else ok(found)


def rollout_figures(setup: Setup, student: Any, teacher: Any, count: int, max_new_tokens: int) -> Finding:
    """Mean token loss, the teacher's log-likelihood of the student's responses, and how many responses do not end."""
    rollouts = _sampled(setup, student, count, max_new_tokens)
    models = local_pair(student, teacher, setup.student.tokenizer, micro_batch=4)
    mask = rollouts.loss_mask.bool()
    hidden = [models[0].hidden(rollouts)[mask], models[1].hidden(rollouts.as_teacher_reads)[mask]]
    scores = score_tokens(
        hidden[0], models[0].head(), hidden[1], models[1].head(), rollouts.response_ids[mask], "reverse"
    )
    kl, nll = float(scores.kl.mean()), float(scores.teacher_nll.mean())
    ends = torch.tensor(setup.student.end_tokens, device=mask.device)
    unfinished = int((~(torch.isin(rollouts.response_ids, ends) & mask).any(-1)).sum())
    found = (
        f"{len(rollouts)} rollouts of {mask.sum() / len(rollouts):.0f} tokens: mean token loss {kl:.2f} nats, the "
        f"teacher's log-likelihood {-nll:.2f} nats/token, {unfinished} not ended after {mask.shape[1]} tokens"
    )
    if not bool(scores.kl.isfinite().all()):
        return fails(found, "A model gives NaN or infinite logits: load it in float32 or bfloat16.")
    remedies = []
    if kl > 3.0:  # nats; our choice
        remedies.append(
            "The models hardly agree: see tokenizer, template and end tokens above, or warm up the student first."
        )
    if unfinished == len(rollouts):
        found, longest = f"every rollout is truncated; {found}", setup.config.max_completion_length or 0
        remedies.append(
            "Raise --max_completion_length, or warm up the student first: it may not know how to end."
            if mask.shape[1] >= longest
            else f"--max-new-tokens {longest} shows whether they end within the run's max_completion_length."
        )
    if remedies:
        return warns(found, " ".join(remedies))
    return ok(found)


def teacher_knows_more(setup: Setup, student: Any, teacher: Any, count: int, max_new_tokens: int) -> Finding:
    """Greedy answers of both models, judged, to prompts that have an answer."""
    rows = [row for row in spread(list(setup.sample), count) if setup.answers[row] is not None]
    if not rows:
        return ok("not compared: the prompts have no answers")
    rule = rule_of(setup)
    if rule == "math" and importlib.util.find_spec("math_verify") is None:
        return warns("answers are not judged: the package math-verify is missing", f"{install('eval')}.")
    tokenizer, right = setup.student.tokenizer, {}
    for role, model, sample in (("student", student, setup.sample), ("teacher", teacher, setup.teacher_sample)):
        prompts = _prompts(sample, rows, model)
        responses = sample_rollouts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0.0)
        texts = tokenizer.batch_decode(responses.response_ids, skip_special_tokens=True)
        right[role] = sum(
            verdict(text, str(setup.answers[row]), rule).right for text, row in zip(texts, rows, strict=True)
        )
    scores = f"teacher {right['teacher']}, student {right['student']}"
    found = f"correct greedy answers, of {len(rows)}: {scores} ({JUDGED[rule]})"
    if right["teacher"] < right["student"]:
        return warns(found, "The student may have little to learn here: check with more samples.")
    if right["teacher"] == 0:
        return warns(
            found,
            f"No answer is correct within {max_new_tokens} tokens: check their format, or raise --max-new-tokens.",
        )
    return ok(found)


def rule_of(setup: Setup) -> Rule:
    """The rule for judging answers: that of the language-model pair's data or of the embedded task, else math."""
    if setup.data in DATA:
        return "gsm8k"
    for prompt, answer in zip(setup.prompts, setup.answers, strict=True):
        problem = read_problem(text_of(prompt))
        if answer is not None and (problem is None or problem.answer != str(answer)):
            return "math"
    return "embedded"
