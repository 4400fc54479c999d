"""One set of weights for student and teacher: the base under the student's adapter is the teacher's too."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_peft_model

from topd.errors import TOPDError
from topd.loading.adapters import config_of, is_adapter, weights_of, with_adapter, without_wrappers
from topd.loading.by_name import SAFE
from topd.loading.sharding import sharded

ONE_MODEL = (
    "The student and the teacher are the same {what}: every token loss is 0 and nothing is learned. Use another "
    "teacher. (If the student is a PeftModel, the teacher is its base without the adapter; teacher_model=self is for "
    "self-distillation, with a teacher prompt.)"
)
NEW_ADAPTER = (
    "A new adapter starts as the base itself, so the token losses and their gradients start at 0. Pass a PeftModel "
    "whose adapter is already trained, or another teacher."
)
TWO_ADAPTERS = (
    "{student} contains an adapter, which is trained further; use_peft would add another one. Leave use_peft out, or "
    "merge the adapter first: topd merge {student} --out {student}-merged."
)
KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of peft's `init_lora_weights` that leave the base's weights as they are."""


VLLM_NOTE = (
    "With use_vllm the teacher is on its own copy of the student's base, which takes memory: TRL merges the student's "
    "adapters into the base to send it to vLLM, and that changes the base a little each time."
)


def refuse_two_adapters(student: Any, peft: Any) -> None:
    """Raise `TOPDError` if a new adapter would be trained on a student that is an adapter."""
    if peft is not None and is_adapter(student):
        raise TOPDError(TWO_ADAPTERS.format(student=student))


def share_base(student: Any, teacher: Any, args: Any, peft: Any = None, quantization: Any = None) -> bool:
    """Whether one set of weights can serve both: the teacher is the student's base, or another adapter on it.

    The student is a name or a loaded model, the teacher a name; loaded ones are compared by their weights
    (`trained_together`). For the other arguments see `prepared_models`.
    """
    loaded = not isinstance(student, str)
    adapters = [peft] if peft is not None else []
    if is_adapter(student):
        adapters.append(config_of(student))
    elif loaded and is_peft_model(student):
        adapters += student.peft_config.values()
    if not isinstance(teacher, str) or not adapters:
        return False
    adapters += [config_of(teacher)] if is_adapter(teacher) else []
    ours = SAFE | ({} if loaded else dict(args.model_init_kwargs or {}))
    theirs = SAFE | dict(args.teacher_model_init_kwargs or {})
    revisions = {ours.pop("revision", None) or "main", theirs.pop("revision", None) or "main"}
    revisions.add(args.teacher_model_revision or "main")
    # where the weights came from
    places = str(student.config._name_or_path) if loaded else weights_of(student), weights_of(teacher)
    return (
        len({os.path.realpath(place) if os.path.isdir(place) else place for place in places}) == 1
        and len(revisions) == 1
        and ours == theirs
        and quantization is None
        and not getattr(student, "is_quantized", False)
        and not changed_base(adapters)
        and not sharded(args)
        and not getattr(args, "use_vllm", False)  # see `apart_from_vllm`
    )


def apart_from_vllm(base: Any, args: Any) -> Any:
    """A student's base as its teacher: the same weights, or with vLLM a copy of them.

    To send the student to vLLM, TRL merges its adapters into the base's weights and subtracts them again. That rounds
    the weights each time, so a teacher on them would change.
    """
    return copy.deepcopy(base).requires_grad_(False) if args.use_vllm else base


def teacher_on_base(student: Any, teacher: str) -> Any | None:
    """The teacher on the weights of the loaded student's base: new modules, and for an adapter its own small weights.

    `teacher`: name of the base, or folder of another adapter on it. None where that adapter is on embeddings or output
    head: it needs its own base, to be merged.
    """
    base = without_adapters(student)
    if not is_adapter(teacher):
        return base
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    adapted = with_adapter(base, teacher)
    for parameter in trained:  # peft froze them; a student without adapters yet is wrapped later
        parameter.requires_grad_(True)
    ends = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    return adapted.eval() if all(without_wrappers(end) is end for end in ends) else None


def trained_together(student: Any, teacher: Any) -> bool:
    """Whether training the student changes the teacher: they are one object, or share weights that are trained."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    return student is teacher or any(p.requires_grad and id(p) in theirs for p in student.parameters())


def base_of_student(student: Any, peft: Any = None) -> Any:
    """The base of a student that is its own teacher. Raises `TOPDError` if neither it nor `peft` has adapters."""
    if peft is None and not is_peft_model(student):
        raise TOPDError(ONE_MODEL.format(what="model object, or share weights that are trained"))
    check_keeps_base([peft])
    return without_adapters(student)


def without_adapters(student: Any) -> Any:
    """The base of a model without its adapters: new modules on the same weights.

    Raises `TOPDError` if the adapters' initialization changed the base's weights.
    """
    if not is_peft_model(student):
        return shared_copy(student)
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    check_keeps_base(student.peft_config.values())
    teacher = shared_copy(student.get_base_model())
    vars(teacher).pop("peft_config", None)
    replaced = "."  # no module's name begins with it
    for name, module in list(teacher.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if getattr(module, "merged", False):
            raise TOPDError("The student's adapter is merged into its base. Unmerge it: model.unmerge_adapter().")
        if name.startswith(replaced):  # a wrapper inside another one
            continue
        replaced = f"{name}."
        plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        parent, _, child = name.rpartition(".")
        setattr(teacher.get_submodule(parent), child, plain)
    return teacher


def changed_base(adapters: Iterable[Any]) -> list[str]:
    """Options of these adapters' configs by which they change what their base computes without them."""
    found = []
    for each in adapters:
        if (start := getattr(each, "init_lora_weights", True)) not in KEEP_BASE:
            found.append(f"init_lora_weights={start}")
        if (bias := getattr(each, "bias", "none")) != "none":  # the base's own, which PEFT saves with the adapter
            found.append(f"bias={bias}")
        if getattr(each, "layer_replication", None):
            found.append("layer_replication")
    return found


def check_keeps_base(adapters: Iterable[Any]) -> None:
    """Raise `TOPDError` if one of these adapters changes its base."""
    if changes := changed_base(adapters):
        raise TOPDError(
            f"{', '.join(changes)} changes the base's weights, so the base without the adapter is not the teacher. "
            "Load the teacher separately, or leave these options at their defaults."
        )


def check_base_is_fixed(teacher: Any, sharded: bool) -> None:
    """Raise `TOPDError` if training would change a teacher that shares the student's weights, or cannot share them."""
    if sharded:
        raise TOPDError(
            "Student and teacher can share one set of weights in one process and under DDP, but not yet with FSDP or "
            "DeepSpeed. Load the teacher separately, or pass its name."
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


def shared_note(student: Any, teacher: Any) -> str:
    """What the two models share, in words."""
    base = student.config._name_or_path or student.config.model_type
    if is_adapter(teacher):
        return f"The teacher is the adapter {teacher} on the student's base ({base}): one set of weights of the base."
    return f"The teacher is the student's base without the adapter ({base}): one set of weights."
