"""Generation by exactly the settings that are asked for, whatever a model's `generation_config.json` says.

`generate` fills every setting that it is not given from the model's generation config, and so do servers. Results would
then depend on settings that are neither printed nor recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from transformers import GenerationConfig

NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Settings of vLLM and SGLang that change nothing, for `SamplingParams` and for requests. A server takes what a request
leaves out from the model's generation config."""


@contextmanager
def own_settings_only(model: Any) -> Iterator[None]:
    """Within it, `model.generate` fills in transformers' defaults, not the model's own generation config.

    Both a PEFT model and its base hold the config, so every module that has one gets a neutral one for the time.
    """
    neutral = GenerationConfig()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(vars(module).get("generation_config"), GenerationConfig):
                stack.enter_context(patch.object(module, "generation_config", neutral))
        yield


def end_token_ids(generation_config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Ids that end a response: the tokenizer's end of sequence, then all that the generation config has (TRL's rule).

    Instruction-tuned models often have two, such as the end of a turn and the end of a text.
    """
    declared = None if generation_config is None else generation_config.eos_token_id
    more = declared if isinstance(declared, list | tuple) else [declared]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *more]) if token is not None]


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding token; without one its end of sequence, else 0 (padding is always masked)."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return next(known, 0)
