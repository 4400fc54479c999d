"""Prepare models for TRL: safetensors only, one tokenizer, equal vocabulary sizes, and no training of the teacher."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import AutoConfig
from trl.trainer.utils import create_model_from_path

from topd.errors import TokenizerMismatchError, TOPDError
from topd.loading.by_name import SAFE
from topd.loading.models import loaded_model, model_to_train
from topd.loading.tokenizers import check_rows, check_tokenizers, compare_tokenizers, tokenizer_of
from topd.logs import get_logger

logger = get_logger(__name__)


ONE_MODEL = (
    "The student and the teacher are the same {what}: every token loss is 0 and nothing is learned. Name another "
    "teacher. (If the student is a PeftModel, the teacher is its base without the adapter.)"
)
NEW_ADAPTER = (
    "A new adapter starts as the base itself, so the token losses and their gradients start at 0. Pass a PeftModel "
    "whose adapter is trained already, or another teacher."
)

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig
KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of peft's `init_lora_weights` that leave the base's weights as they are."""


@dataclass(frozen=True)
class Prepared:
    """Both models, as names where TRL can load them itself.

    Attributes:
        notes: what was changed, and what could not be compared.
        shared: whether the teacher is the student's base, with one set of weights.
    """

    student: Any
    teacher: Any
    notes: tuple[str, ...] = ()
    shared: bool = False

    def report(self, sharded: bool) -> None:
        """Log the notes; call it after the trainer has been given the models.

        Raises:
            TOPDError: training would change the base, which is the teacher.
        """
        for note in self.notes:
            logger.warning(note)
        if self.shared:
            check_base_is_fixed(self.teacher, sharded)


def prepared_models(
    student: Any, teacher: Any, args: TOPDConfig, tokenizer: Any = None, peft: Any = None, quantization: Any = None
) -> Prepared:
    """Check both models, and load those that TRL must not load itself.

    Models of one family may pad their output heads to different sizes (151,936 and 152,064 rows for the same 151,669
    tokens). The larger head is cut: its additional rows belong to no token, and their probabilities could not be
    compared. A head is never cut below the tokenizer. A loaded teacher is copied (all other weights are shared) and the
    copy is cut; a loaded student is changed in place, which the notes report.

    Args:
        student, teacher: a name, a folder, or a loaded model; the teacher may be None.
        args: its `model_init_kwargs` and `teacher_model_init_kwargs` are completed.
        tokenizer: the student's; None: it is loaded from the student's folder or Hub name.
        peft: the `PeftConfig`, if new adapters are trained.
        quantization: the student's, if it is loaded by name.

    Raises:
        TOPDError: student and teacher are the same model with all weights trained, or there is no tokenizer.
        TokenizerMismatchError: their tokenizers differ, or a head has too few rows for the tokenizer.
    """
    student, teacher = model_to_train("student", student), model_to_train("teacher", teacher)
    if isinstance(student, str):
        args.model_init_kwargs = SAFE | _dict(args.model_init_kwargs)
    if isinstance(teacher, str):
        args.teacher_model_init_kwargs = SAFE | _dict(args.teacher_model_init_kwargs)
    if teacher is None:  # on a server
        return Prepared(student, teacher)
    if _same_name(student, teacher, args):
        if peft is None:
            raise TOPDError(ONE_MODEL.format(what=f"model, {student}"))
        if quantization is None and _loaded_alike(args):
            student = teacher = _load_student(student, args, None)
            args.teacher_model_init_kwargs = None
    if not (isinstance(student, str) or isinstance(teacher, str)) and trained_together(student, teacher):
        base = base_of_student(student, peft)
        shared = (_shared_note(student), NEW_ADAPTER if peft is not None else "")
        return Prepared(student, base, tuple(filter(None, shared)), shared=True)

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
        cut_head(student, theirs)
    elif theirs > ours:
        if isinstance(teacher, str):
            defaults = {"dtype": None, "revision": args.teacher_model_revision}
            teacher = load(teacher, args, defaults | _dict(args.teacher_model_init_kwargs))
            args.teacher_model_init_kwargs = None
        teacher = with_rows(teacher, ours)
    if ours != theirs:
        notes.append(heads_message(ours, theirs))
    return Prepared(student, teacher, tuple(filter(None, notes)))


def _same_name(student: Any, teacher: Any, args: TOPDConfig) -> bool:
    revisions = _dict(args.model_init_kwargs).get("revision"), args.teacher_model_revision
    ours, theirs = (revision or "main" for revision in revisions)
    return isinstance(student, str) and student == teacher and ours == theirs


def _loaded_alike(args: TOPDConfig) -> bool:
    """Whether both would be loaded with the same options, so that one set of weights can serve as both."""
    ours, theirs = (_dict(given) for given in (args.model_init_kwargs, args.teacher_model_init_kwargs))
    return {**ours, "revision": None} == {**theirs, "revision": None}


def _load_student(name: str, args: TOPDConfig, quantization: Any) -> Any:
    options = _dict(args.model_init_kwargs)
    args.model_init_kwargs = None  # TRL accepts them for names only
    return load(name, args, options if quantization is None else options | {"quantization_config": quantization})


# One set of weights


def trained_together(student: Any, teacher: Any) -> bool:
    """Whether training the student changes the teacher: they are one object, or share weights that are trained."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    return student is teacher or any(p.requires_grad and id(p) in theirs for p in student.parameters())


def base_of_student(student: Any, peft: Any = None) -> Any:
    """The teacher of a student that is its own teacher: its base.

    Raises:
        TOPDError: the student has no adapters, and `peft` adds none.
    """
    if peft is None and not is_peft_model(student):
        raise TOPDError(ONE_MODEL.format(what="model object, or share weights that are trained"))
    return without_adapters(student)


def without_adapters(student: Any) -> Any:
    """The base of a model without its adapters: new modules on the same weights.

    Raises:
        TOPDError: the adapters' initialization changed the base's weights.
    """
    if not is_peft_model(student):
        return shared_copy(student)
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    began = {getattr(config, "init_lora_weights", True) for config in student.peft_config.values()}
    if not began <= {*KEEP_BASE}:
        raise TOPDError(
            f"init_lora_weights={began - {*KEEP_BASE}} changes the base's weights, so the base without the adapter is "
            "not the teacher. Load the teacher separately, or leave init_lora_weights at its default."
        )
    teacher = shared_copy(student.get_base_model())
    for name, module in list(teacher.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if getattr(module, "merged", False):
            raise TOPDError("The student's adapter is merged into its base. Unmerge it: model.unmerge_adapter().")
        plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        parent, _, child = name.rpartition(".")
        setattr(teacher.get_submodule(parent), child, plain)
    return teacher


def check_base_is_fixed(teacher: Any, sharded: bool) -> None:
    """Raise `TOPDError` if training would change a teacher that shares the student's weights, or cannot share them."""
    if sharded:
        raise TOPDError(
            "Student and teacher can share one set of weights in one process and under DDP, not with FSDP or DeepSpeed "
            "so far. Load the teacher separately, or name it."
        )
    moving = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if moving:
        raise TOPDError(
            f"Training would change the base, which is the teacher: {', '.join(moving[:3])}. Train adapters only "
            "(bias='none'), or load the teacher separately."
        )


def shared_copy(model: Any, own: tuple[Any, ...] = ()) -> Any:
    """A copy of modules and config on the same parameters, except those in `own`, which are copied too."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if all(p is not each for each in own)}
    return copy.deepcopy(model, memo)


def _shared_note(student: Any) -> str:
    base = student.config._name_or_path or student.config.model_type
    return f"The teacher is the student's base without the adapter ({base}): one set of weights."


# Output heads


def heads_message(ours: int, theirs: int) -> str:
    return (
        f"The output heads have {ours:,} rows (student) and {theirs:,} (teacher); the larger one is cut to "
        f"{min(ours, theirs):,}: the removed rows are padding and belong to no token."
    )


def head_rows(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> int:
    """Rows of a model's output head, for a name from its config."""
    config = model.config if not isinstance(model, str) else None
    config = config or AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
    return int(config.get_text_config().vocab_size)


def cut_head(model: Any, rows: int) -> None:
    """Keep only the first rows of embeddings and output head; in place."""
    model.resize_token_embeddings(rows)


def with_rows(teacher: Any, rows: int) -> Any:
    """A copy of a teacher with only the first rows of its head; all other weights are shared."""
    ends = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    teacher = shared_copy(teacher, own=tuple(p for end in ends if end is not None for p in end.parameters()))
    cut_head(teacher, rows)
    return teacher


def load(name: str, args: TOPDConfig, options: dict[str, Any]) -> Any:
    """Load a model as TRL does: with several processes, each on its own device."""
    options = {"trust_remote_code": args.trust_remote_code} | options
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return create_model_from_path(name, **options)


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
        cut_head(models[rows.index(max(rows))], min(rows))
    return models[0], models[1], tokenizer


def loaded_teacher(student: Any, teacher: Any, args: Any, revision: str | None, sharded: bool) -> Any:
    """A frozen teacher for a loaded student: a name is loaded, the student's base is shared, padding rows are cut.

    Raises:
        TOPDError: student and teacher are one model.
        TokenizerMismatchError: the teacher's head has fewer rows than the student's.
    """
    if isinstance(teacher, str):
        options = SAFE | {"revision": revision} if revision else SAFE
        teacher = load(teacher, args, options | _dict(args.teacher_model_init_kwargs))
    elif trained_together(student, teacher):
        teacher = base_of_student(student)
        check_base_is_fixed(teacher, sharded)
    ours, theirs = head_rows(student), head_rows(teacher)
    if theirs < ours:
        raise TokenizerMismatchError(
            f"The student's output head has {ours} tokens, the teacher's {theirs}; both need the same vocabulary: "
            "resize_token_embeddings the student to the teacher's."
        )
    return (with_rows(teacher, ours) if theirs > ours else teacher).requires_grad_(False)


def _dict(options: Any) -> dict[str, Any]:
    return dict(options or {})
