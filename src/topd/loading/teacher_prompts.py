"""The teacher's own prompt: what it reads, in place of the student's prompt, before the student's response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topd.errors import TOPDError
from topd.loading.prompts import prompt_ids
from topd.loading.rows import TEACHER_PROMPT

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig

SELF = "self"
"""As the name of a teacher: the student as it was before training."""
SAME_PROMPT = (
    "With teacher_model=self the teacher is the student before training, so without a prompt of its own every token "
    "loss starts at 0. Give the teacher one: a column teacher_prompt, teacher_system_prompt or "
    "teacher_chat_template_kwargs (docs/teacher_prompt.md)."
)


def has_teacher_prompts(args: TOPDConfig, dataset: Any) -> bool:
    """Whether the teacher's prompts differ from the student's, by the options or by a column of the dataset."""
    return by_options(args) or TEACHER_PROMPT in columns_of(dataset)


def by_options(args: TOPDConfig) -> bool:
    """Whether options give the teacher another prompt."""
    return args.teacher_system_prompt is not None or bool(args.teacher_chat_template_kwargs)


def columns_of(dataset: Any) -> list[str]:
    """Names of the columns; of a stream that does not know them, those of its first row."""
    names = getattr(dataset, "column_names", None)
    if names is None:
        names = next(iter(() if dataset is None else dataset), {})
    return list(names)


def check_options(args: TOPDConfig) -> None:
    """Raise `TOPDError` for options that need TRL's loss, which passes one prompt to both models."""
    if args.opd_loss == "trl" and not args.looks_ahead:
        raise TOPDError("opd_loss=trl gives both models the same prompt; a teacher prompt needs auto or one_pass.")
    if args.max_informative_tokens is not None:
        raise TOPDError(
            "max_informative_tokens needs the same prompt for both models: leave out it or the teacher prompt."
        )
    if args.beta not in (0.0, 1.0):
        raise TOPDError(f"A teacher prompt needs beta 1 (reverse KL) or 0 (forward KL); got beta={args.beta:g}.")


def teacher_prompt(prompt: Any, own: Any, system: str | None) -> Any:
    """What the teacher reads: the row's own `teacher_prompt`, else (None) the student's, with its own system turn.

    `system` replaces the system turn, or becomes the first one (`TOPDError` for text); None: it stays.
    """
    chosen = prompt if own is None else own
    if system is None:
        return chosen
    if isinstance(chosen, str):
        raise TOPDError(
            "teacher_system_prompt needs prompts as messages; for text write the column teacher_prompt, with the whole "
            "prompt of the teacher."
        )
    turns = chosen[1:] if chosen[0]["role"] == "system" else chosen
    return [{"role": "system", "content": system}, *turns]


def teacher_prompt_ids(tokenizer: Any, prompt: Any, own: Any, args: TOPDConfig) -> list[int]:
    """Token ids of what the teacher reads; see `teacher_prompt`. Raises `TOPDError` where the template fails."""
    given: tuple[Any, ...] = (args.chat_template_kwargs, args.teacher_chat_template_kwargs)
    options = {name: value for part in given for name, value in (part or {}).items()}
    return prompt_ids(tokenizer, teacher_prompt(prompt, own, args.teacher_system_prompt), options)
