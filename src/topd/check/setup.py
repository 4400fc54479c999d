"""What is known about a run before any weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError
from topd.loading.adapters import weights_of
from topd.loading.dataset_checks import check_teacher_prompts
from topd.loading.models import load_config
from topd.loading.prompts import prompt_ids
from topd.loading.teacher_prompts import by_options, teacher_prompt_ids
from topd.loading.tokenizers import tokenizer_of
from topd.near_future.model_parts import end_token_ids
from topd.training.config import TOPDConfig

SAMPLE = 256
"""Number of prompts that are tokenized to measure their lengths."""


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """A model without its weights."""

    role: str  # "student" or "teacher"
    name: str  # as given
    folder: str  # as `from_pretrained` takes it
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    generation: GenerationConfig

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response, as in TRL: those of the generation config and of the tokenizer."""
        return sorted(end_token_ids(self.generation, self.tokenizer))


@dataclass(frozen=True, eq=False)
class Setup:
    """A planned run."""

    student: ModelInfo
    teacher: ModelInfo
    config: TOPDConfig  # the options of `topd train`
    prompts: Sequence[Any]  # all of them, text or messages
    answers: Sequence[str | None]  # of the prompts; None for a prompt without one
    data: str  # the source of the prompts, as given
    dtypes: Mapping[str, str]  # of the weights of both roles: "float32", "bfloat16", "float16" or "auto"
    adapters: bool = False  # whether only adapters are trained (PEFT)
    one_base: bool = False  # whether student and teacher are on one set of weights
    teacher_here: bool = True  # whether its weights are available; else `teacher` is what the server serves
    model: Any = None  # TRL's `ModelConfig`: how the student is loaded, and its adapters
    evaluation: int | None = None  # number of prompts for the evaluation loss; None: there are none
    teacher_prompts: Sequence[Any] | None = None  # the column of that name; None: there is none

    @property
    def pair(self) -> tuple[ModelInfo, ModelInfo]:
        return self.student, self.teacher

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompts[0], str)

    @property
    def template_options(self) -> dict[str, Any]:
        options: Any = self.config.chat_template_kwargs or {}
        return dict(options)

    @cached_property
    def sample(self) -> dict[int, list[int]]:
        """Row and token ids of prompts spread over the data, and of the longest prompt last. May raise `TOPDError`."""
        chosen = [*range(0, len(self.prompts), max(1, len(self.prompts) // SAMPLE))][:SAMPLE]
        longest = max(range(len(self.prompts)), key=lambda i: _characters(self.prompts[i]))
        rows = {i: self.prompts[i] for i in [*chosen, longest]}
        return {i: prompt_ids(self.student.tokenizer, row, self.template_options) for i, row in rows.items()}

    @property
    def prompted(self) -> bool:
        return by_options(self.config) or self.teacher_prompts is not None

    @cached_property
    def teacher_sample(self) -> dict[int, list[int]]:
        """What the teacher reads: `sample` where it has no prompts of its own, else the same rows of its prompts and
        the longest of them last. Raises `TOPDError` if a row has none, or the chat template fails.
        """
        if not self.prompted:
            return self.sample
        own = self.teacher_prompts
        if own is not None:
            check_teacher_prompts(self.prompts, own, self.data)
        longest = max(range(len(self.prompts)), key=lambda i: _characters((own or self.prompts)[i]))
        rows = dict.fromkeys([*self.sample, longest])
        prompts = {i: None if own is None else own[i] for i in rows}
        return {i: teacher_prompt_ids(self.student.tokenizer, self.prompts[i], prompts[i], self.config) for i in rows}


def describe(role: str, name: str, trust_remote_code: bool = False, revision: str | None = None) -> ModelInfo:
    """A model's tokenizer and configs. Raises `TOPDError` if they cannot be read."""
    folder = resolve_model(name)
    tokenizer = tokenizer_of(folder, trust_remote_code, revision)
    if tokenizer is None:
        raise TOPDError(f"{name} contains no tokenizer. Save the model's own: tokenizer.save_pretrained(...).")
    config = load_config(folder, trust_remote_code=trust_remote_code, revision=revision or "main")
    try:
        generation = GenerationConfig.from_pretrained(weights_of(folder), revision=revision or "main")
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    return ModelInfo(role, name, folder, tokenizer, config, generation)


def _characters(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
