"""`MOPDTrainer`: several teachers, each for its own rows of the dataset (multi-teacher on-policy distillation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer
from trl import DistillationTrainer
from trl.trainer.utils import create_model_from_path

from topd.near_future import DistilledModel, RoutedTeacher
from topd.training.batch import TEACHER
from topd.training.config import TOPDConfig
from topd.training.prepared import SAFE, cut_head, head_rows, heads_in_words
from topd.training.tokenizers import check_tokenizers
from topd.training.trainer import TOPDTrainer

COLUMN = "teacher"
"""Of the dataset: the name of the row's teacher."""


class _TellsTeachers(DistillationTrainer):
    """Between TOPD's trainer and TRL's: each rollout's teacher is part of the batch from the start."""

    _numbers: dict[str, int]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        names = [row.get(COLUMN) for row in inputs]
        unknown = sorted({str(name) for name in names if name not in self._numbers})
        if unknown:
            raise ValueError(
                f"The dataset's column {COLUMN!r} names {', '.join(unknown)}; the teachers are: "
                f"{', '.join(self._numbers)}."
            )
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        numbers = [self._numbers[str(name)] for name in names]
        return batch | {TEACHER: torch.tensor(numbers, device=batch["completion_ids"].device)}


class MOPDTrainer(TOPDTrainer, _TellsTeachers):
    """`TOPDTrainer` with a teacher for each row, named in the dataset's column `teacher`.

    Token losses, windows and guidance are those of the row's own teacher.

    Args:
        model: the student, as in `TOPDTrainer`.
        teacher_model: name of each teacher -> model name, folder, or loaded model.
        args: with `opd_loss="one_pass"` where the method is `opd`.

    Raises:
        ValueError: for what does not work with several teachers: see the messages.
    """

    def __init__(
        self, model: Any, teacher_model: Mapping[str, Any], args: TOPDConfig, *rest: Any, **kwargs: Any
    ) -> None:
        if not (args.looks_ahead or args.opd_in_one_pass):
            raise ValueError("Several teachers need opd_loss=one_pass with method=opd: TRL's loss has one teacher.")
        if args.embedding.startswith("teacher"):
            raise ValueError("Several teachers need embedding=student or student_hidden: windows meet in one space.")
        if kwargs.get("eval_dataset") is not None or args.max_overhead or args.teacher_window_server:
            raise ValueError(
                "eval_dataset, max_overhead and teacher_window_server work with one teacher so far: leave them out."
            )
        names = list(teacher_model)
        super().__init__(model, teacher_model[names[0]], args, *rest, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("Several teachers work in one process or under DDP so far, not with FSDP or DeepSpeed.")
        self._numbers = {name: number for number, name in enumerate(names)}
        self._teachers = [self.teacher_model, *(self._prepared(teacher_model[name]) for name in names[1:])]
        self._routed: RoutedTeacher | None = None

    def _prepared(self, teacher: Any) -> Any:
        if isinstance(teacher, str):
            trust = self.args.trust_remote_code
            check_tokenizers(self._tokenizer, AutoTokenizer.from_pretrained(teacher, trust_remote_code=trust))
            given: Any = self.args.teacher_model_init_kwargs or {}
            teacher = create_model_from_path(teacher, **(SAFE | {"trust_remote_code": trust} | given))
        ours, theirs = head_rows(self.model), head_rows(teacher)
        if theirs < ours:
            raise ValueError(
                f"{heads_in_words(ours, theirs)} With several teachers, name first the one with fewest rows."
            )
        if theirs > ours:
            cut_head(teacher, ours)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _teacher(self) -> DistilledModel:
        if self._routed is None:
            self._routed = RoutedTeacher([self._distilled(self.accelerator.unwrap_model(t)) for t in self._teachers])
        return self._routed
