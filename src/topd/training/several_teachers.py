"""`MOPDTrainer`: several teachers, each for its own rows of the dataset (multi-teacher on-policy distillation)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from topd.errors import DataError, TOPDError
from topd.loading.models import model_to_train, names_of
from topd.loading.pair import loaded_teacher
from topd.loading.sharding import held_whole
from topd.loading.teacher_prompts import SELF
from topd.near_future.protocol import Teacher
from topd.teachers.from_options import contexts
from topd.teachers.routed import RoutedTeacher
from topd.training.batch import TEACHER
from topd.training.config import TOPDConfig
from topd.training.trainer import TOPDTrainer

COLUMN, COLUMN_OF_TRL = "teacher", "teacher_id"
"""Of the dataset: the name of the row's teacher. The second name, of TRL's pull request 7215, is accepted too."""


class MOPDTrainer(TOPDTrainer):
    """`TOPDTrainer` with a teacher for each row, named in the dataset's column `teacher` (or `teacher_id`).

    Token losses, windows and guidance are those of the row's own teacher.

    Args:
        model: the student, as in `TOPDTrainer`.
        teacher_model: name of each teacher -> model name, folder, or loaded model.
        args: with `opd_loss="one_pass"` where the method is `opd`.

    Raises:
        TOPDError: for what does not work with several teachers, and where the dataset names others: see the messages.
    """

    _several_teachers = True
    _own_columns = (*TOPDTrainer._own_columns, COLUMN)

    def __init__(
        self, model: Any, teacher_model: Mapping[str, Any], args: TOPDConfig, train_dataset: Any = None,
        eval_dataset: Any = None, *rest: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        teachers = {str(name): teacher for name, teacher in teacher_model.items()}
        check_options(args, teachers, eval_dataset)
        columns = getattr(train_dataset, "column_names", None) or []
        if COLUMN_OF_TRL in columns and COLUMN not in columns:
            train_dataset = train_dataset.rename_column(COLUMN_OF_TRL, COLUMN)
        check_routing(train_dataset, list(teachers))
        first, *others = teachers.values()
        super().__init__(model, first, args, train_dataset, None, *rest, **kwargs)
        if self.is_deepspeed_enabled:
            raise TOPDError("Several teachers are not supported with DeepSpeed yet: use one process, DDP or FSDP2.")
        self._names = names_of(student=model, **{f"teacher {name}": teacher for name, teacher in teachers.items()})
        self._numbers = {name: number for number, name in enumerate(teachers)}
        self._teacher_names = list(teachers)
        remedy = " With several teachers, name first the one with fewest rows."
        more = (loaded_teacher(self, model_to_train("teacher", teacher), remedy=remedy) for teacher in others)
        self._teachers = [self.teacher_model, *more]
        self._routed: RoutedTeacher | None = None

    def _models(self) -> dict[str, Any]:
        named = {f"teacher {name}": self._teachers[number] for name, number in self._numbers.items()}
        return {"student": self.model} | named

    def _teacher(self) -> Teacher:
        if self._routed is None:
            self._routed = RoutedTeacher([self._distilled(self.accelerator.unwrap_model(t)) for t in self._teachers])
        return self._routed

    def _own_entries(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [str(row.get(COLUMN)) for row in inputs]
        check_names(gather_object(names), list(self._numbers))  # of all processes: in a stream one may meet it alone
        numbers = torch.tensor([self._numbers[name] for name in names], device=self.accelerator.device)
        return super()._own_entries(inputs) | {TEACHER: numbers}

    def _contexts_of_teacher(self, row: Mapping[str, Any]) -> dict[str, PreTrainedConfig]:
        return contexts(None, self._teachers[self._numbers[str(row[COLUMN])]], None)

    def _local_teachers(self) -> list[Any]:
        return self._teachers

    # Each process asks the teachers that its own rows name, so they are held whole whenever they are asked: parts that
    # are gathered layer by layer would need all processes in step.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._teachers_whole():
            return super()._generate_and_score_completions(inputs)

    def _stop_on(self, what: str) -> None:
        with self._teachers_whole():
            super()._stop_on(what)

    @contextmanager
    def _models_whole(self, all_of_them: bool = False) -> Iterator[None]:
        with held_whole(self.model_wrapped, self.accelerator):
            yield

    @contextmanager
    def _teachers_whole(self) -> Iterator[None]:
        with ExitStack() as stack:
            for teacher in self._teachers:
                stack.enter_context(held_whole(teacher, self.accelerator))
            yield


def check_options(args: TOPDConfig, teachers: Mapping[str, Any], eval_dataset: Any) -> None:
    """Raise `TOPDError` for what works with one teacher only."""
    if not teachers:
        raise TOPDError("MOPDTrainer needs at least one teacher: {name: model}.")
    if args.teacher_model_server_url:
        raise TOPDError("teacher_model_server_url works with one teacher; pass the weights of all teachers instead.")
    if SELF in teachers.values():
        raise TOPDError("self is not supported among several teachers yet: pass the student's folder instead.")
    if eval_dataset is not None or args.max_overhead:
        raise TOPDError("eval_dataset and max_overhead are not supported with several teachers yet: leave them out.")
    if not (args.looks_ahead or args.opd_in_one_pass):
        raise TOPDError("Several teachers need opd_loss=one_pass with method=opd: TRL's loss has one teacher.")


def check_routing(dataset: Any, teachers: Sequence[str]) -> None:
    """Raise `DataError` unless every row of the dataset names a teacher. Of a stream only the columns are looked at."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if COLUMN not in columns:
        raise DataError(
            f"The dataset has no column {COLUMN!r}, which names each row's teacher. Its columns are: "
            f"{', '.join(columns)}."
        )
    if isinstance(dataset, Dataset):
        check_names([str(name) for name in dataset.unique(COLUMN)], teachers)


def check_names(names: Sequence[str], teachers: Sequence[str]) -> None:
    unknown = sorted({name for name in names if name not in teachers})
    if unknown:
        raise DataError(
            f"The dataset's column {COLUMN!r} names {', '.join(unknown[:10])}; the teachers are: {', '.join(teachers)}."
        )
