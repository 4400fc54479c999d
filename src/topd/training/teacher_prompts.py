"""Part of `TOPDTrainer`: the teacher's own prompts, as entries of the batch. See docs/teacher_prompt.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from trl import DistillationTrainer

from topd.errors import TOPDError
from topd.loading.dataset_checks import check_teacher_prompts, check_tokens
from topd.loading.rows import TEACHER_PROMPT
from topd.loading.teacher_prompts import teacher_prompt_ids
from topd.loading.tokenizers import check_context
from topd.near_future.padding import left_padded
from topd.teachers.from_options import contexts
from topd.training.config import TOPDConfig
from topd.training.guidance import TEACHER_PROMPT_ENTRIES


class TeacherPrompts(DistillationTrainer):
    """Between TOPD's trainer and TRL's: what the teacher reads is part of the batch from the start."""

    args: TOPDConfig
    _server: Any
    _prompted: bool

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._prompted:
            return super()._generate_and_score_completions(inputs)
        prompts = [torch.tensor(ids) for ids in self._teacher_prompt_ids(inputs)]
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        padded = left_padded(prompts, self._tokenizer.pad_token_id)
        device = batch["prompt_ids"].device
        return batch | dict(zip(TEACHER_PROMPT_ENTRIES, (part.to(device) for part in padded), strict=True))

    def _teacher_prompt_ids(self, inputs: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of what the teacher reads, by row, checked before anything is sampled.

        Raises:
            ContextError: a prompt, its response and a window do not fit the teacher's context.
            DataError: a row has no teacher's prompt where others have one, or it is empty.
        """
        if any(TEACHER_PROMPT in row for row in inputs):
            check_teacher_prompts([row["prompt"] for row in inputs], map(_own, inputs), "the batch")
        ids = [teacher_prompt_ids(self._tokenizer, row["prompt"], _own(row), self.args) for row in inputs]
        check_tokens(ids)
        window = self.args.window_length if self.args.looks_ahead else 0
        for row, theirs in zip(inputs, ids, strict=True):
            check_context(
                len(theirs), self._tokenizer.decode(theirs), self.max_completion_length or 0, window,
                self._contexts_of_teacher(row), what=f"The teacher's prompt for {row['prompt']!r:.160} of",
            )  # fmt: skip
        return ids

    def _contexts_of_teacher(self, row: Mapping[str, Any]) -> dict[str, PreTrainedConfig]:
        """Configs of who reads the teacher's prompt of a row."""
        return contexts(None, self.teacher_model, self._server)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if TEACHER_PROMPT not in columns:
            columns.append(TEACHER_PROMPT)

    def _refuse_prompts_beside_images(self) -> None:
        """Raise `TOPDError` where the teacher has its own prompts and the student's have images or tools."""
        if self._prompted and (self._is_vlm or self.tools):
            raise TOPDError("A teacher prompt works on text without tools so far; leave out images and tools, or it.")


def _own(row: Mapping[str, Any]) -> Any:
    """The row's own teacher's prompt; None if it has none."""
    return row.get(TEACHER_PROMPT)
