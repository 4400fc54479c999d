"""Options of all commands that read data: in which form people have it."""

import json
from dataclasses import dataclass, field
from typing import Any

from topd.loading.rows import DataForm

FORM = {
    "prompt_column": "Name of the column with the prompt. Default: the first of prompt, problem, question, messages, "
    "conversations.",
    "system_prompt": "A system prompt for conversations that have none. A prompt that is text becomes the user's "
    "message after it.",
    "data_config": "Configuration of a dataset on the Hub, or of a folder that load_dataset reads.",
}
"""Options and their help."""


@dataclass
class FormArguments:
    """How rows become prompts."""

    prompt_column: str | None = field(default=None, metadata={"help": FORM["prompt_column"]})
    system_prompt: str | None = field(default=None, metadata={"help": FORM["system_prompt"]})
    data_config: str | None = field(default=None, metadata={"help": FORM["data_config"]})

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            setattr(self, name, source_of(getattr(self, name, None)))


def add_form_options(parser: Any) -> None:
    """The same options for a parser of argparse."""
    for name, text in FORM.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{text[0].lower()}{text[1:].removesuffix('.')}")


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
    word = given[0]
    if not (isinstance(word, str) and word.lstrip().startswith("{")):
        return word
    try:
        mixture = json.loads(word)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data is {word:.60}; write a JSON object of sources and weights, or a name.") from error
    return mixture
