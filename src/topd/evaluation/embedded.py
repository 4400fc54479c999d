"""Accuracy of a model on the embedded task."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topd.embedded.task import Level, Problem, is_correct
from topd.near_future.model_parts import end_token_ids, own_settings_only, padding_id

MAX_NEW_TOKENS: dict[Level, int] = {"short": 96, "long": 224}
"""Longer than any worked solution of the level."""
BATCH = 256
"""Problems that are answered together."""


@torch.no_grad()
def answer_problems(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], *, temperature: float = 0.0
) -> list[str]:
    """The model's solution to each problem: greedy at temperature 0, else sampled from the full distribution."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(problems)), key=lambda index: len(problems[index].prompt))
    texts, ends = [""] * len(problems), end_token_ids(model.generation_config, tokenizer)
    decoding = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        inputs = tokenizer([problems[i].prompt for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        with own_settings_only(model):
            output = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=max(MAX_NEW_TOKENS[problem.level] for problem in problems),
                pad_token_id=padding_id(tokenizer), eos_token_id=ends, **decoding,
            )  # fmt: skip
        solutions = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, solutions, strict=True):
            texts[index] = text
    model.train(was_training)
    return texts


def correct_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], *, temperature: float = 0.0
) -> list[bool]:
    """Whether each problem is answered correctly."""
    texts = answer_problems(model, tokenizer, problems, temperature=temperature)
    return [is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]


def greedy_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> float:
    """Share of problems answered correctly with greedy decoding, 0..1."""
    correct = correct_answers(model, tokenizer, problems)
    return sum(correct) / len(correct)
