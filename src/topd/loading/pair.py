"""Prepare models for TRL: safetensors only, one tokenizer, equal vocabulary sizes, and no training of the teacher."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from topd.errors import TokenizerMismatchError, TOPDError
from topd.loading import shared_base
from topd.loading.adapters import base_of, is_adapter, merged, with_adapter
from topd.loading.by_name import SAFE
from topd.loading.models import load_config, loaded_model, model_to_train
from topd.loading.sharding import shard_teacher, sharded
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
        """Log the notes once the trainer has the models. Raises `TOPDError` if training would change the teacher."""
        for note in self.notes:
            logger.warning(note)
        if self.shared:
            shared_base.check_base_is_fixed(self.teacher, in_parts)


def prepared_models(
    student: Any, teacher: Any, args: TOPDConfig, tokenizer: Any = None, peft: Any = None, quantization: Any = None
) -> Prepared:
    """Check both models, and load those that TRL must not load itself.

    Models of one family may pad their output heads to different sizes (151,936 and 152,064 rows for the same 151,669
    tokens). The larger head is cut: its additional rows belong to no token, and their probabilities could not be
    compared. A head is never cut below the tokenizer. A loaded teacher is copied (all other weights are shared) and the
    copy is cut; a loaded student is changed in place, which the notes report.

    `student`, `teacher`: a name, a folder, or a loaded model; the teacher may be None, or "self": a frozen copy of the
    student, or its base if adapters are trained. `args`: its `model_init_kwargs` and `teacher_model_init_kwargs` are
    completed. `tokenizer`: the student's; None: it is loaded from the student's folder or Hub name. `peft`: the
    `PeftConfig`, if new adapters are trained. `quantization`: the student's, if it is loaded by name.

    Raises:
        TOPDError: student and teacher are the same model with all weights trained, there is no tokenizer, or a dtype is
            unknown.
        TokenizerMismatchError: their tokenizers differ, or a head has too few rows for the tokenizer.
    """
    itself = isinstance(teacher, str) and teacher == SELF
    student, teacher = model_to_train("student", student), None if itself else model_to_train("teacher", teacher)
    if isinstance(student, str):
        args.model_init_kwargs = _init_kwargs(args.model_init_kwargs)
    if isinstance(teacher, str):
        args.teacher_model_init_kwargs = _init_kwargs(args.teacher_model_init_kwargs)
    revisions = _dict(args.model_init_kwargs).get("revision") or "main", args.teacher_model_revision or "main"
    if isinstance(student, str) and student == teacher and revisions[0] == revisions[1] and peft is None:
        raise TOPDError(shared_base.ONE_MODEL.format(what=f"model, {student}"))
    shares = teacher is not None and shared_base.share_base(student, teacher, args, peft, quantization)
    if isinstance(student, str) and (itself or shares or is_adapter(student)):
        shared_base.refuse_two_adapters(student, peft)
        tokenizer = tokenizer_of(student, args.trust_remote_code) if tokenizer is None else tokenizer
        student = _load_student(student, args, quantization)
    if itself:
        args.teacher_model_init_kwargs = None
        if peft is None and not is_peft_model(student):
            return Prepared(student, copy.deepcopy(student).requires_grad_(False))
        return _on_base(student, shared_base.base_of_student(student, peft), student, args)
    if teacher is None:  # on a server
        return Prepared(student, teacher)
    if shares or not (isinstance(student, str) or isinstance(teacher, str)):
        on_one_base = _on_one_base(student, teacher, args, tokenizer, peft)
        if on_one_base is not None:
            return on_one_base

    trust, revision = args.trust_remote_code, _dict(args.model_init_kwargs).get("revision")
    ours, theirs = head_rows(student, trust, revision), head_rows(teacher, trust, args.teacher_model_revision)
    tokenizer = tokenizer_of(student, trust, revision) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise TOPDError("The student's tokenizer is unknown: pass it to the trainer as processing_class=tokenizer.")
    notes = [compare_tokenizers(tokenizer, teacher, trust, args.teacher_model_revision)]
    notes.append(check_rows(tokenizer, ours, theirs))
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


def _on_one_base(student: Any, teacher: Any, args: TOPDConfig, tokenizer: Any, peft: Any) -> Prepared | None:
    """Both on one set of weights; None where the teacher needs its own."""
    if isinstance(teacher, str):
        base = shared_base.teacher_on_base(student, teacher)
        if base is None:
            return None
        args.teacher_model_init_kwargs = None
        if is_adapter(teacher) and tokenizer is not None:
            compare_tokenizers(tokenizer, teacher, args.trust_remote_code, None)
    elif shared_base.trained_together(student, teacher):
        base = shared_base.base_of_student(student, peft)
    else:
        return None
    new = (shared_base.NEW_ADAPTER,) if peft is not None and not is_adapter(teacher) else ()
    return _on_base(student, base, teacher, args, new)


def _on_base(student: Any, base: Any, teacher: Any, args: TOPDConfig, notes: tuple[str, ...] = ()) -> Prepared:
    """A student with `base`, its base with or without the teacher's adapter, as the teacher."""
    teaches = shared_base.apart_from_vllm(base, args)
    if teaches is not base:
        return Prepared(student, teaches, (shared_base.VLLM_NOTE, *notes))
    return Prepared(student, base, (shared_base.shared_note(student, teacher), *notes), shared=True)


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


def heads_message(ours: int, theirs: int) -> str:
    return (
        f"The output heads have {ours:,} rows (student) and {theirs:,} (teacher); the larger one is cut to "
        f"{min(ours, theirs):,}: the removed rows are padding and belong to no token."
    )


def head_rows(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> int:
    """Rows of a model's output head, for a name from its config."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = load_config(model, **options) if isinstance(model, str) else model.config
    return int(config.get_text_config().vocab_size)


def with_rows(teacher: Any, rows: int) -> Any:
    """A copy of a teacher with only the first rows of its head; all other weights are shared."""
    ends = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    own = tuple(parameter for end in ends if end is not None for parameter in end.parameters())
    teacher = shared_base.shared_copy(teacher, own)
    teacher.resize_token_embeddings(rows)
    return teacher


def load(name: str, args: Any, options: dict[str, Any], trained: bool = False) -> Any:
    """Load a model as TRL does: with several processes, each on its own device.

    `trained`: an adapter is put on its base and trained; else it is merged, or left as it is on a quantized base.
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
    """Both models with output heads of equal size, see `loaded_model`, and their common tokenizer."""
    (student, tokenizer), (teacher, teacher_tokenizer) = (loaded_model(n, dtype) for n in (student_name, teacher_name))
    check_tokenizers(tokenizer, teacher_tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ours, theirs = head_rows(student), head_rows(teacher)
    notes = [check_rows(tokenizer, ours, theirs), heads_message(ours, theirs) if ours != theirs else None]
    for note in filter(None, notes):
        print(f"topd: {note}", file=sys.stderr)
    if ours != theirs:
        (student if ours > theirs else teacher).resize_token_embeddings(min(ours, theirs))
    return student, teacher, tokenizer


def loaded_teacher(trainer: Any, teacher: Any, revision: str | None = None, remedy: str = "") -> Any:
    """A frozen teacher for a trainer's student: a name is loaded, the student's base is shared, padding rows are cut.

    It is placed as the student is: whole in each process, or in parts with FSDP2 and DeepSpeed. Raises `TOPDError` for
    one model as both, `TokenizerMismatchError` for other tokenizers or a head with too few rows (with `remedy`).
    """
    student, args, accelerator = trainer.model, trainer.args, trainer.accelerator
    if note := compare_tokenizers(trainer._tokenizer, teacher, args.trust_remote_code, revision):
        logger.warning(note)
    in_parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    base = shared_base.teacher_on_base(student, teacher) if shared_base.share_base(student, teacher, args) else None
    if not isinstance(teacher, str) and shared_base.trained_together(student, teacher):
        base = shared_base.apart_from_vllm(shared_base.base_of_student(student), args)
    if base is not None:
        teacher = base
        shared_base.check_base_is_fixed(teacher, in_parts)
    elif isinstance(teacher, str):
        options = SAFE | {"revision": revision} if revision else SAFE
        teacher = load(teacher, args, options | _dict(args.teacher_model_init_kwargs))
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
