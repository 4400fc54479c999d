"""Part of `TOPDTrainer`: rollouts by the options' settings alone, from prompts as every command reads them."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from topd.loading.prompts import one_beginning, without_nulls
from topd.near_future.generation import own_settings_only


class OwnRollouts:
    """What TRL's trainer leaves to the model's generation config and to the data is decided here."""

    accelerator: Accelerator
    model: Any
    _tokenizer: Any

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """One BOS at most, and no null keys of Arrow in messages."""
        trl: Any = super()
        ids, images, fields = trl._tokenize_prompts(without_nulls(prompts))
        return [one_beginning(each, self._tokenizer) for each in ids], images, fields

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing of the student's generation config but its end tokens."""
        trl: Any = super()
        with own_settings_only(self.accelerator.unwrap_model(self.model)):
            return trl._generate_single_turn(*args, **kwargs)
