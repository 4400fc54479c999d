"""Solutions as the token ids that the student would generate, and whether they teach it to stop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy

from topd.errors import DataError, TOPDError
from topd.loading.prompts import closing_id, solution_ids

LOOKED_AT = 1000
"""Number of rows of a prepared dataset that are searched for end tokens."""


def as_generated(dataset: Any, tokenizer: Any, ends: Sequence[int], completion_only: bool, **template: Any) -> Any:
    """Convert `prompt` and `completion` to `input_ids` and `labels`: the ids that generation would read and write.

    Prompts are text or messages; a completion is text, or one assistant message. Other datasets are returned unchanged.
    `dataset`: of `datasets`, also a streamed one. `ends`: ids that end a response. `completion_only`: whether
    the loss excludes the prompt. `template`: options of the chat template for every row; a row's own
    `chat_template_kwargs` override them. Raises `TOPDError` if there is no end token, `DataError` for a row of another
    form than the first.
    """
    first = next(iter(dataset))
    if not _is_solution(first):
        return dataset
    if not ends:
        raise TOPDError("The student has no end token. Set eos_token in its tokenizer: it must learn where to stop.")

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        if not _is_solution(row):  # its tools or further turns would be dropped
            raise DataError(
                f"A row is not a prompt and one answer as text, without tools, as the first row has: {row!r:.200}. "
                "Train on rows of one form at a time."
            )
        options = template | (row.get("chat_template_kwargs") or {})
        closing = closing_id(tokenizer, ends, options, not isinstance(row["prompt"], str))
        completion = row["completion"]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        prompt, written = solution_ids(tokenizer, row["prompt"], text, options, closing)
        labels = [-100] * len(prompt) if completion_only else prompt
        return {"input_ids": prompt + written, "labels": labels + written}

    return dataset.map(tokenize, remove_columns=list(first))


def endings(dataset: Any, ends: Sequence[int]) -> tuple[int, int, list[int]]:
    """For the first rows: number of solutions, number that train an end token, the last ids of one that does not."""
    count, ended, other = 0, 0, list[int]()
    for row in islice(dataset, LOOKED_AT):
        labels = numpy.asarray(row["labels"])
        lengths = row.get("seq_lengths") or [len(labels)]
        for solution in numpy.split(labels, numpy.cumsum(lengths)[:-1]):
            count += 1
            if numpy.isin(solution, ends).any():
                ended += 1
            else:
                other = solution[solution >= 0][-3:].tolist()
    return count, ended, other


def check_that_it_can_stop(dataset: Any, tokenizer: Any, ends: Sequence[int], max_length: int | None) -> str | None:
    """A warning if some solutions train no end token. Raises `TOPDError` if none does, or there are none."""
    count, ended, other = endings(dataset, ends)
    if 0 < count == ended:
        return None
    names = ", ".join(f"{tokenizer.decode([token])!r} ({token})" for token in ends)
    if ended:
        return (
            f"{count - ended} of {count} solutions train no end token ({names}): max_length {max_length} truncates "
            "them. The student does not learn to stop from these. Raise max_length, or leave long solutions out."
        )
    raise TOPDError(
        f"No solution trains an end token ({names}), so the student would not learn to stop. They end with "
        f"{tokenizer.decode(other)!r}. If max_length {max_length} truncates them, raise it. If that is the end of a "
        "turn, give it as --eos_token, which adds it to the student's end tokens. Otherwise make the chat template "
        "write the end token after the assistant's turn."
    )


def _is_solution(row: dict[str, Any]) -> bool:
    """Whether a row is a prompt and one answer, without tools."""
    completion = row.get("completion")
    if not isinstance(row.get("prompt"), str | list) or row.get("tools") or not row["prompt"]:
        return False
    return isinstance(completion, str) or (
        isinstance(completion, list)
        and len(completion) == 1
        and completion[0].get("role") == "assistant"
        and isinstance(completion[0].get("content"), str)
        and not completion[0].get("tool_calls")
    )
