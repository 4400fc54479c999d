"""Options of all commands that read data: in which form people have it."""

from dataclasses import dataclass, field, fields
from typing import Any

from topd.loading.rows import DataForm
from topd.parsing import read_json


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options; `text`: its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class FormArguments:
    """How rows become prompts."""

    prompt_column: str | None = option(
        None,
        "Name of the column with the prompt. Default: the first of prompt, problem, question, messages, conversations.",
    )
    system_prompt: str | None = option(
        None,
        "System prompt for conversations that have none. A plain-text prompt becomes the user message after it.",
    )
    data_config: str | None = option(
        None, "Configuration of a dataset on the Hub, or of a folder that load_dataset reads."
    )

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            setattr(self, name, source_of(getattr(self, name, None)))


def add_form_options(parser: Any) -> None:
    """The same options for a parser of argparse."""
    for each in fields(FormArguments):
        text = each.metadata["help"].removesuffix(".")
        parser.add_argument(f"--{each.name.replace('_', '-')}", help=f"{text[0].lower()}{text[1:]}")


def form_of(options: Any) -> DataForm:
    return DataForm(options.prompt_column, options.system_prompt, options.data_config)


def source_of(given: Any) -> Any:
    """A source as `load_prompts` takes it: of one word of a command line, the word, or the mixture that it writes.

    Raises `ValueError` if it begins with { and is no JSON object, or names a source twice.
    """
    if not isinstance(given, list) or len(given) != 1:
        return given or None
    (word,) = given
    try:
        return read_json(word) if word.lstrip().startswith("{") else word
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data is {word:.60}; write a JSON object of sources and weights, or a name ({error})."
        ) from error
