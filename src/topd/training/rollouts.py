"""Part of `TOPDTrainer`: rollouts by the options' settings alone, from prompts as every command reads them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator

from topd.loading.dataset_checks import check_prompts, check_tokens
from topd.loading.prompts import one_beginning, without_nulls
from topd.loading.sharding import unsharded
from topd.loading.tokenizers import check_context
from topd.near_future import DistilledModel
from topd.near_future.generation import own_settings_only
from topd.near_future.sampling_states import SamplingStates, has_dropout
from topd.teachers.from_options import contexts
from topd.training.config import TOPDConfig


class OwnRollouts:
    """What TRL's trainer leaves to the model's generation config and to the data is decided here.

    What the student computes while it samples is kept in `_sampling`, so that it need not read its rollouts again.
    """

    accelerator: Accelerator
    args: TOPDConfig
    model: Any
    teacher_model: Any
    use_vllm: bool
    max_completion_length: int | None
    _is_vlm: bool
    _tokenizer: Any
    _server: Any
    _sampling: SamplingStates | None = None

    def _student(self) -> DistilledModel:
        raise NotImplementedError

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Check prompts, which a stream gives batch by batch. At most one BOS; no null keys of Arrow in messages."""
        check_prompts(prompts, "the batch")
        trl: Any = super()
        ids, images, fields = trl._tokenize_prompts(without_nulls(prompts))
        ids = [one_beginning(each, self._tokenizer) for each in ids]
        check_tokens(ids)
        longest, window = max(ids, key=len), self.args.window_length if self.args.looks_ahead else 0
        check_context(
            len(longest), self._tokenizer.decode(longest), self.max_completion_length or 0, window,
            contexts(self.model, self.teacher_model, self._server),
        )  # fmt: skip
        return ids, images, fields

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's generation, by nothing of the student's generation config but its end tokens."""
        if self.use_vllm:
            return self._by_own_settings(*args, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        keeps = self.args.looks_ahead and self.model.training and not has_dropout(student)
        self._sampling = SamplingStates() if keeps else self._sampling
        with unsharded(student), self._sampling.keeping(student) if keeps and self._sampling else nullcontext():
            return self._generate_in_groups(*args, **kwargs)

    def _generate_in_groups(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Prompts that must not share a batch are generated one group after the other."""
        lengths = [len(ids) for ids in prompt_ids]
        if self._is_vlm or len(set(lengths)) == 1:
            return self._by_own_settings(prompt_ids, *args, **kwargs)
        ways = self._student().ways
        groups = ways.together(lengths, [-n for n in lengths], growth=self.max_completion_length or 0)
        responses: list[Any] = [None] * len(lengths)
        for group in groups:
            sampled = self._by_own_settings([prompt_ids[row] for row in group], *args, **kwargs)
            for row, response in zip(group, sampled, strict=True):
                responses[row] = response
        return responses

    def _by_own_settings(self, *args: Any, **kwargs: Any) -> Any:
        trl: Any = super()
        with own_settings_only(self.accelerator.unwrap_model(self.model)):
            return trl._generate_single_turn(*args, **kwargs)
