"""Options of all commands that read data: in which form people have it."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from topd.loading.rows import DataForm


def _option(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass
class FormArguments:
    """How rows become prompts."""

    prompt_column: str | None = _option(
        "Name of the column with the prompt. Default: the first of prompt, problem, question, messages, conversations."
    )
    system_prompt: str | None = _option(
        "A system prompt for conversations that have none. A prompt that is text becomes the user's message after it."
    )
    data_config: str | None = _option("Configuration of a dataset on the Hub, or of a folder that load_dataset reads.")

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            setattr(self, name, source_of(getattr(self, name, None)))


def add_form_options(parser: Any) -> None:
    """The same options for a parser of argparse."""
    for option in fields(FormArguments):
        text = option.metadata["help"].removesuffix(".")
        parser.add_argument(f"--{option.name.replace('_', '-')}", help=f"{text[0].lower()}{text[1:]}")


def form_of(options: Any) -> DataForm:
    """The form that a command's options give."""
    return DataForm(options.prompt_column, options.system_prompt, options.data_config)


def source_of(given: Any) -> Any:
    """A source as `load_prompts` takes it: of one word of a command line, the word, or the mixture that it writes.

    Raises:
        ValueError: it begins with { and is no JSON object.
    """
    if not isinstance(given, list) or len(given) != 1:
        return given or None
    (word,) = given
    try:
        return json.loads(word) if word.lstrip().startswith("{") else word
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data is {word:.60}; write a JSON object of sources and weights, or a name.") from error
