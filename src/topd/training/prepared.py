"""What is seen to before TRL takes the models: weights from safetensors only, and output heads of one size."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from trl.trainer.utils import create_model_from_path

from topd.training.config import TOPDConfig

SAFE = {"use_safetensors": True}
"""Pickled weights (`.bin`) are not read, unless `model_init_kwargs` or `teacher_model_init_kwargs` say so."""


def prepared_models(student: Any, teacher: Any, args: TOPDConfig) -> tuple[Any, Any, str | None]:
    """Both models, as names wherever TRL can load them, and what was changed, in words.

    Models of one family may pad their output heads to different sizes (151,936 and 152,064 rows for the same 151,669
    tokens). The larger head is cut: the rows that only one model has belong to no token, and a probability for them
    could not be compared.

    Args:
        student, teacher: a name, a folder, or a loaded model; the teacher may be None.
        args: its `model_init_kwargs` and `teacher_model_init_kwargs` are completed.
    """
    if isinstance(student, str):
        args.model_init_kwargs = SAFE | _dict(args.model_init_kwargs)
    if isinstance(teacher, str):
        args.teacher_model_init_kwargs = SAFE | _dict(args.teacher_model_init_kwargs)
    if teacher is None:  # on a server
        return student, teacher, None
    ours = head_rows(student, args.trust_remote_code, _dict(args.model_init_kwargs).get("revision"))
    theirs = head_rows(teacher, args.trust_remote_code, args.teacher_model_revision)
    if ours > theirs:
        if isinstance(student, str):
            student = load(student, args, _dict(args.model_init_kwargs))
            args.model_init_kwargs = None  # TRL takes them for names only
        cut_head(student, theirs)
    elif theirs > ours:
        if isinstance(teacher, str):
            options = {"dtype": None, "revision": args.teacher_model_revision} | _dict(args.teacher_model_init_kwargs)
            teacher = load(teacher, args, options)
            args.teacher_model_init_kwargs = None
        cut_head(teacher, ours)
    return student, teacher, heads_in_words(ours, theirs) if ours != theirs else None


def heads_in_words(ours: int, theirs: int) -> str:
    return (
        f"The output heads have {ours:,} rows (student) and {theirs:,} (teacher) for the same tokenizer; the larger "
        f"one is cut to {min(ours, theirs):,}: the rows that go are padding and belong to no token."
    )


def head_rows(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> int:
    """Rows of a model's output head; of a name, by its config."""
    config = model.config if not isinstance(model, str) else None
    config = config or AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
    return int(config.get_text_config().vocab_size)


def cut_head(model: Any, rows: int) -> None:
    """Keep the first rows of embeddings and output head; in place."""
    model.resize_token_embeddings(rows)


def load(name: str, args: TOPDConfig, options: dict[str, Any]) -> Any:
    """As TRL loads it: in several processes, each on its own device."""
    options = {"trust_remote_code": args.trust_remote_code} | options
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return create_model_from_path(name, **options)


def _dict(options: Any) -> dict[str, Any]:
    """`TOPDConfig` has parsed JSON by now."""
    return dict(options or {})
