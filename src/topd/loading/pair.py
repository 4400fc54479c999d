"""Prepare models for TRL: safetensors only, one tokenizer, equal vocabulary sizes, and no training of the teacher."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from topd.errors import TokenizerMismatchError, TOPDError
from topd.loading.adapters import base_of, is_adapter, merged, weights_of, with_adapter
from topd.loading.by_name import SAFE
from topd.loading.models import loaded_model, model_to_train
from topd.loading.sharding import shard_teacher, sharded
from topd.loading.shared_base import (
    NEW_ADAPTER,
    ONE_MODEL,
    base_of_student,
    check_base_is_fixed,
    refuse_two_adapters,
    share_base,
    shared_copy,
    shared_note,
    teacher_on_base,
    trained_together,
)
from topd.loading.teacher_prompts import SELF
from topd.loading.tokenizers import check_rows, check_tokenizers, compare_tokenizers, tokenizer_of
from topd.logs import get_logger

logger = get_logger(__name__)


if TYPE_CHECKING:
    from topd.training.config import TOPDConfig


@dataclass(frozen=True)
class Prepared:
    """Both models, as names where TRL can load them itself."""

    student: Any
    teacher: Any
    notes: tuple[str, ...] = ()  # what was changed, and what could not be compared
    shared: bool = False  # whether the teacher is the student's base, with one set of weights

    def report(self, in_parts: bool) -> None:
        """Log the notes; call it after the trainer has been given the models.

        Raises:
            TOPDError: training would change the base, which is the teacher.
        """
        for note in self.notes:
            logger.warning(note)
        if self.shared:
            check_base_is_fixed(self.teacher, in_parts)


def prepared_models(
    student: Any, teacher: Any, args: TOPDConfig, tokenizer: Any = None, peft: Any = None, quantization: Any = None
) -> Prepared:
    """Check both models, and load those that TRL must not load itself.

    Models of one family may pad their output heads to different sizes (151,936 and 152,064 rows for the same 151,669
    tokens). The larger head is cut: its additional rows belong to no token, and their probabilities could not be
    compared. A head is never cut below the tokenizer. A loaded teacher is copied (all other weights are shared) and the
    copy is cut; a loaded student is changed in place, which the notes report.

    Args:
        student, teacher: a name, a folder, or a loaded model; the teacher may be None, or "self": a frozen copy of the
            student, or its base if adapters are trained.
        args: its `model_init_kwargs` and `teacher_model_init_kwargs` are completed.
        tokenizer: the student's; None: it is loaded from the student's folder or Hub name.
        peft: the `PeftConfig`, if new adapters are trained.
        quantization: the student's, if it is loaded by name.

    Raises:
        TOPDError: student and teacher are the same model with all weights trained, there is no tokenizer, or a dtype is
            unknown.
        TokenizerMismatchError: their tokenizers differ, or a head has too few rows for the tokenizer.
    """
    itself = isinstance(teacher, str) and teacher == SELF
    student, teacher = model_to_train("student", student), None if itself else model_to_train("teacher", teacher)
    if isinstance(student, str):
        args.model_init_kwargs = _init_kwargs(args.model_init_kwargs)
    if itself:
        return _with_itself(student, args, peft, quantization)
    if isinstance(teacher, str):
        args.teacher_model_init_kwargs = _init_kwargs(args.teacher_model_init_kwargs)
    if isinstance(student, str) and student == teacher and _revisions_are_one(args) and peft is None:
        raise TOPDError(ONE_MODEL.format(what=f"model, {student}"))
    shares = teacher is not None and share_base(student, teacher, args, peft, quantization)
    if isinstance(student, str) and (is_adapter(student) or shares):
        refuse_two_adapters(student, peft)
        tokenizer = tokenizer_of(student, args.trust_remote_code) if tokenizer is None else tokenizer
        student = _load_student(student, args, quantization)
    if teacher is None:  # on a server
        return Prepared(student, teacher)
    if shares or not (isinstance(student, str) or isinstance(teacher, str)):
        on_one_base = _on_one_base(student, teacher, args, tokenizer, peft)
        if on_one_base is not None:
            return on_one_base

    trust, options = args.trust_remote_code, _dict(args.model_init_kwargs)
    ours, theirs = (
        head_rows(student, trust, options.get("revision")), head_rows(teacher, trust, args.teacher_model_revision)
    )  # fmt: skip
    tokenizer = tokenizer_of(student, trust, options.get("revision")) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise TOPDError("The student's tokenizer is unknown: pass it to the trainer as processing_class=tokenizer.")
    notes = [
        compare_tokenizers(tokenizer, teacher, trust, args.teacher_model_revision), check_rows(tokenizer, ours, theirs)
    ]  # fmt: skip
    if ours > theirs:
        if isinstance(student, str):
            student = _load_student(student, args, quantization)
        else:
            notes.append("The student's output head is cut in place.")
        student.resize_token_embeddings(theirs)
    elif theirs > ours:
        if isinstance(teacher, str):
            teacher = _load_teacher(teacher, args)
        teacher = with_rows(teacher, ours)
    if ours != theirs:
        notes.append(heads_message(ours, theirs))
    if is_adapter(teacher):
        teacher = _load_teacher(teacher, args)
    return Prepared(student, teacher, tuple(filter(None, notes)))


def _with_itself(student: Any, args: TOPDConfig, peft: Any, quantization: Any) -> Prepared:
    """The student, and as its teacher what it is before training: its base if adapters are trained, else a copy."""
    if isinstance(student, str):
        refuse_two_adapters(student, peft)
        student = _load_student(student, args, quantization)
    args.teacher_model_init_kwargs = None
    if peft is None and not is_peft_model(student):
        return Prepared(student, copy.deepcopy(student).requires_grad_(False))
    return Prepared(student, base_of_student(student, peft), (shared_note(student, student),), shared=True)


def _on_one_base(student: Any, teacher: Any, args: TOPDConfig, tokenizer: Any, peft: Any) -> Prepared | None:
    """Both on one set of weights; None where the teacher needs its own."""
    if isinstance(teacher, str):
        base = teacher_on_base(student, teacher)
        if base is None:
            return None
        args.teacher_model_init_kwargs = None
        if is_adapter(teacher) and tokenizer is not None:
            compare_tokenizers(tokenizer, teacher, args.trust_remote_code, None)
    elif trained_together(student, teacher):
        base = base_of_student(student, peft)
    else:
        return None
    notes = shared_note(student, teacher), NEW_ADAPTER if peft is not None and not is_adapter(teacher) else ""
    return Prepared(student, base, tuple(filter(None, notes)), shared=True)


def _revisions_are_one(args: TOPDConfig) -> bool:
    ours, theirs = _dict(args.model_init_kwargs).get("revision"), args.teacher_model_revision
    return (ours or "main") == (theirs or "main")


def _load_student(name: str, args: TOPDConfig, quantization: Any) -> Any:
    options = _dict(args.model_init_kwargs)
    args.model_init_kwargs = None  # TRL accepts them for names only
    options |= {} if quantization is None else {"quantization_config": quantization}
    return load(name, args, options, trained=True)


def _load_teacher(name: str, args: TOPDConfig) -> Any:
    defaults = {"dtype": None, "revision": args.teacher_model_revision}
    options = defaults | _dict(args.teacher_model_init_kwargs)
    args.teacher_model_init_kwargs = None
    return load(name, args, options)


# Output heads


def heads_message(ours: int, theirs: int) -> str:
    return (
        f"The output heads have {ours:,} rows (student) and {theirs:,} (teacher); the larger one is cut to "
        f"{min(ours, theirs):,}: the removed rows are padding and belong to no token."
    )


def head_rows(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> int:
    """Rows of a model's output head, for a name from its config."""
    config = model.config if not isinstance(model, str) else None
    config = config or AutoConfig.from_pretrained(
        weights_of(model), trust_remote_code=trust_remote_code, revision=revision
    )
    return int(config.get_text_config().vocab_size)


def with_rows(teacher: Any, rows: int) -> Any:
    """A copy of a teacher with only the first rows of its head; all other weights are shared."""
    ends = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    teacher = shared_copy(teacher, own=tuple(p for end in ends if end is not None for p in end.parameters()))
    teacher.resize_token_embeddings(rows)
    return teacher


def load(name: str, args: Any, options: dict[str, Any], trained: bool = False) -> Any:
    """Load a model as TRL does: with several processes, each on its own device.

    Args:
        trained: an adapter is put on its base and trained; else it is merged, or left as it is on a quantized base.
    """
    options = {"trust_remote_code": args.trust_remote_code} | options
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    if not is_adapter(name):
        return create_model_from_path(name, **options)
    base = create_model_from_path(base_of(name), **options)
    if trained or getattr(base, "is_quantized", False):
        return with_adapter(base, name, trained=trained)
    return merged(base, name, check=not sharded(args))


def load_pair(student_name: str, teacher_name: str, dtype: str = "auto") -> tuple[Any, Any, Any]:
    """Both models with output heads of equal size, see `loaded_model`, and their common tokenizer.

    Raises:
        TOPDError: one cannot be loaded, or the tokenizers differ.
    """
    loaded = [loaded_model(name, dtype) for name in (student_name, teacher_name)]
    models, (tokenizer, teacher_tokenizer) = [model for model, _ in loaded], [each for _, each in loaded]
    check_tokenizers(tokenizer, teacher_tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [head_rows(model) for model in models]
    notes = [check_rows(tokenizer, *rows), heads_message(*rows) if rows[0] != rows[1] else None]
    for note in filter(None, notes):
        print(f"topd: {note}", file=sys.stderr)
    if rows[0] != rows[1]:
        models[rows.index(max(rows))].resize_token_embeddings(min(rows))
    return models[0], models[1], tokenizer


def loaded_teacher(trainer: Any, teacher: Any, revision: str | None = None, remedy: str = "") -> Any:
    """A frozen teacher for a trainer's student: a name is loaded, the student's base is shared, padding rows are cut.

    It is placed as the student is: whole in each process, or in parts with FSDP2 and DeepSpeed. `remedy`: for the
    message where its head has too few rows.

    Raises:
        TOPDError: student and teacher are one model.
        TokenizerMismatchError: their tokenizers differ, or the teacher's head has fewer rows than the student's.
    """
    student, args, accelerator = trainer.model, trainer.args, trainer.accelerator
    note = compare_tokenizers(trainer._tokenizer, teacher, args.trust_remote_code, revision)
    if note:
        logger.warning(note)
    in_parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    base = teacher_on_base(student, teacher) if share_base(student, teacher, args) else None
    if base is not None:
        teacher = base
        check_base_is_fixed(teacher, in_parts)
    elif isinstance(teacher, str):
        options = SAFE | {"revision": revision} if revision else SAFE
        teacher = load(teacher, args, options | _dict(args.teacher_model_init_kwargs))
    elif trained_together(student, teacher):
        teacher = base_of_student(student)
        check_base_is_fixed(teacher, in_parts)
    ours, theirs = head_rows(student), head_rows(teacher)
    if theirs < ours:
        raise TokenizerMismatchError(
            f"The student's output head has {ours} tokens, the teacher's {theirs}; both need the same vocabulary: "
            f"resize_token_embeddings the student to the teacher's.{remedy}"
        )
    teacher = (with_rows(teacher, ours) if theirs > ours else teacher).requires_grad_(False)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(teacher, accelerator)
    if trainer.is_fsdp_enabled:
        return shard_teacher(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def _init_kwargs(given: Any) -> dict[str, Any]:
    """Options of `from_pretrained`: no pickled weights, and the dtype by its name, as TRL reads the teacher's."""
    options = SAFE | _dict(given)
    dtype = options.get("dtype") or "auto"
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise TOPDError(f"dtype is {dtype!r}; write auto, float32, bfloat16 or float16.")
    return options if options.get("dtype") is None else options | {"dtype": name}


def _dict(options: Any) -> dict[str, Any]:
    return dict(options or {})
