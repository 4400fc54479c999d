"""Check a trainer's dataset: one dataset, with a prompt in every row, and enough rows for a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from topd.errors import DataError
from topd.loading.rows import CONVERSATION_COLUMNS, PROMPT_COLUMNS, TEACHER_PROMPT
from topd.loading.teacher_prompts import columns_of

COLUMN = "prompt"
IMAGES = ("image", "images")
"""Columns that TRL's trainer reads images from."""
_REMEDIES = {name: f"dataset.rename_column({name!r}, 'prompt')" for name in PROMPT_COLUMNS if name != COLUMN} | {
    name: f"dataset.map(lambda row: {{'prompt': row[{name!r}][:-1]}}) keeps all but the last answer"
    for name in CONVERSATION_COLUMNS
}
"""Remedies if the prompts are in another column."""


def check_datasets(train: Any, evaluation: Any) -> None:
    """Raise `DataError` unless a trainer's datasets hold prompts; the evaluation may be several datasets by name."""
    parts = {"train_dataset": train} | evaluations(evaluation)
    parts = {name: dataset for name, dataset in parts.items() if dataset is not None}
    for name, dataset in parts.items():
        check_dataset(dataset, name)
    without = [name for name, dataset in parts.items() if TEACHER_PROMPT not in columns_of(dataset)]
    if 0 < len(without) < len(parts):
        raise DataError(
            f"{', '.join(without)} has no column {TEACHER_PROMPT!r}, and another dataset has: their losses would not "
            "be comparable. Add it, or remove it from the other."
        )


def evaluations(given: Any) -> dict[str, Any]:
    """The evaluation's datasets by their names in messages. Raises `DataError` if one has no rows."""
    several = isinstance(given, Mapping)
    parts = {f"eval_dataset[{name!r}]": each for name, each in given.items()} if several else {"eval_dataset": given}
    for name, dataset in parts.items():
        if hasattr(dataset, "__len__") and not len(dataset):
            raise DataError(f"{name} has no rows: nothing would be evaluated. Pass rows, or leave it out.")
    return parts


def check_dataset(dataset: Any, name: str = "train_dataset") -> None:
    """Raise `DataError` unless this is one dataset with a prompt in every row; `name` is the trainer's argument.

    Only the columns of a stream are checked; its rows are checked per batch.
    """
    check_one(dataset, name)
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        check_columns(columns, name)
    if columns is not None and hasattr(dataset, "__len__"):
        check_prompts(dataset[COLUMN], name)
        if TEACHER_PROMPT in columns:
            check_teacher_prompts(dataset[COLUMN], dataset[TEACHER_PROMPT], name)


def check_solutions(dataset: Any, text_column: str) -> None:
    """Raise `DataError` unless the warm start's dataset has rows, and columns that TRL's `SFTTrainer` takes."""
    if dataset is None or (hasattr(dataset, "__len__") and not len(dataset)):
        state = "There is nothing to train on" if dataset is None else "train_dataset has no rows"
        raise DataError(f"{state}: pass a dataset with the columns 'prompt' and 'completion'.")
    columns = getattr(dataset, "column_names", None)
    forms = {COLUMN, "completion"}, {"messages"}, {"conversations"}, {text_column}, {"input_ids"}
    if columns is not None and not any(form <= set(columns) for form in forms):
        raise DataError(
            f"train_dataset has no columns 'prompt' and 'completion'; its columns are {', '.join(columns) or 'none'}. "
            "Rename those with prompts and solutions (dataset.rename_column), or give a column 'messages'."
        )


def check_columns(columns: Sequence[str], name: str) -> None:
    """Raise `DataError` unless one of the columns holds prompts."""
    if COLUMN not in columns:
        remedy = next((_REMEDIES[column] for column in columns if column in _REMEDIES), "rename the one with prompts")
        raise DataError(f"{name} has no column 'prompt'; its columns are {', '.join(columns) or 'none'}. {remedy}.")


def without_images(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a model of text: without columns of images. Raises `DataError` if a row has an image."""
    for name in IMAGES:
        if any(row.get(name) for row in rows):
            raise DataError(
                f"The dataset has images (column {name!r}), and the student reads text only. Use a dataset of text: "
                f"dataset.remove_columns({name!r}) leaves the images out."
            )
    return [{name: value for name, value in row.items() if name not in IMAGES} for row in rows]


def check_one(dataset: Any, name: str = "train_dataset") -> None:
    """Raise `DataError` if several datasets are given in place of one."""
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{name} has the splits {', '.join(map(str, dataset))}. Pass one of them: {name}=dataset["
            f"{next(iter(dataset), 'train')!r}]."
        )


def check_prompts(prompts: Iterable[Any], name: str = "train_dataset") -> None:
    """Raise `DataError`, naming rows from 0, unless every prompt is text or messages."""
    _refuse([_fault(prompt) for prompt in prompts], f"{name} has prompts")


def check_teacher_prompts(prompts: Iterable[Any], own: Iterable[Any], name: str = "train_dataset") -> None:
    """Raise `DataError`, naming rows from 0, unless every teacher's prompt is text or messages, as its row's prompt."""
    other = "text and messages; use one kind in both columns"
    faults = [
        _fault(theirs) or (other if isinstance(prompt, str) != isinstance(theirs, str) else None)
        for prompt, theirs in zip(prompts, own, strict=True)
    ]
    _refuse(faults, f"{name} has teacher prompts (column {TEACHER_PROMPT})")


def _refuse(faults: Sequence[str | None], what: str) -> None:
    """Raise `DataError` if a row has a fault."""
    broken = [f"row {row}: {fault}" for row, fault in enumerate(faults) if fault]
    if broken:
        more = f", and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise DataError(
            f"{what} that cannot be used: {'; '.join(broken[:3])}{more}. Fix or remove these rows: text, or messages "
            "with role and content."
        )


def check_tokens(prompt_ids: Sequence[Sequence[int]]) -> None:
    """Raise `DataError` if a prompt has no tokens: the template renders it to nothing."""
    if not all(map(len, prompt_ids)):
        raise DataError(
            "A prompt has no tokens after the chat template: fix the template (chat_template.jinja), or give prompts "
            "as text."
        )


def _fault(prompt: Any) -> str | None:
    """What is wrong with a prompt; None if nothing is."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "the prompt is empty" if not prompt else "the prompt is blank"
    if not isinstance(prompt, list) or not prompt:
        return f"the prompt is {prompt!r:.40}"
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f"{message!r:.40} is not a message with role and content"
        if message["content"] is None and not message.get("tool_calls"):
            return f"the {message['role']}'s message has no content"
    return None


def step_size(args: Any) -> tuple[int, str]:
    """Prompts per batch of rollouts, which is one optimizer step by default, and how the number is computed."""
    accumulated = args.gradient_accumulation_steps
    together = getattr(args, "generation_steps", accumulated)
    sizes = args.per_device_train_batch_size, together, args.world_size
    count, product = math.prod(sizes), " x ".join(map(str, sizes))
    what, factor = ("step", "accumulated") if together == accumulated else ("generation", "steps_per_generation")
    return count, f"a {what} takes {count:,} prompts ({product}: per device, {factor}, processes)"


def check_enough(dataset: Any, args: Any) -> None:
    """Raise `DataError` if there is no data, or less than one step takes."""
    if dataset is None:
        raise DataError("There is nothing to train on: pass train_dataset, a dataset with the column 'prompt'.")
    step, found = step_size(args)
    if hasattr(dataset, "__len__") and len(dataset) < step:
        raise DataError(
            f"{found[0].upper()}{found[1:]}, and train_dataset has {len(dataset):,}: there would be no step. Add "
            "prompts, or lower per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation."
        )
