"""Parts of `TOPDTrainer`: its two models as the step sees them, what each reads, and the rollouts that are sampled."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from trl import DistillationTrainer

from topd.errors import TOPDError
from topd.loading.dataset_checks import check_prompts, check_teacher_prompts, check_tokens, without_images
from topd.loading.precision import autocasting
from topd.loading.prompts import explained_template, plain_messages
from topd.loading.rows import TEACHER_PROMPT
from topd.loading.sharding import held_whole, unsharded, without_checkpointing
from topd.loading.teacher_prompts import teacher_prompt_ids
from topd.loading.tokenizers import check_context
from topd.logs import get_logger
from topd.near_future import DistilledModel, LocalModel
from topd.near_future.fast_decoding import fast_decoding
from topd.near_future.model_parts import left_padded, one_beginning, own_settings_only
from topd.near_future.protocol import Teacher
from topd.near_future.sampling import InformativeEnd, SamplingStates, compact_sampling, has_dropout, stopping_by
from topd.near_future.ways import ArchitectureError, Ways, ways_of
from topd.teachers.from_options import contexts
from topd.teachers.server_windows import ServerWindows
from topd.teachers.top_k import TopKTeacher
from topd.training.batch import TEACHER_PROMPT_ENTRIES
from topd.training.config import TOPDConfig

logger = get_logger(__name__)


class BothModels(DistillationTrainer):
    """Part of `TOPDTrainer`: what it and TRL's trainer hold, as `DistilledModel` or `TopKTeacher`."""

    args: TOPDConfig
    model: Any
    teacher_model: Any
    _server: ServerWindows | None
    _prompted: bool
    """Whether the teacher has its own prompts."""
    _several_teachers = False
    _tried: list[Ways] | None = None
    _warned_of_trl = False

    def _student(self) -> DistilledModel:
        return self._distilled(self.accelerator.unwrap_model(self.model))

    def _teacher(self) -> Teacher:
        if self.teacher_model is None:
            assert self._server is not None
            return TopKTeacher(self._server, self.args.loss_top_k)
        return self._distilled(self.accelerator.unwrap_model(self.teacher_model), self._server)

    def _distilled(self, model: Any, server: ServerWindows | None = None) -> DistilledModel:
        return DistilledModel(
            model,
            self._local(model) if server is None else server,
            lambda function, *args: self._forward_redirection(model, model, function, *args),
            temperature=self.temperature,
            micro_batch=self.args.per_device_train_batch_size,
            share_prefix=server is None,
        )

    def _try_ways(self) -> None:
        """Find out which ways are exact for both models, once, while they are held whole. See `ways_of`.

        Raises:
            ArchitectureError: a model cannot be distilled.
        """
        if self._tried is not None:
            return
        in_parts = self.is_fsdp_enabled or self.is_deepspeed_enabled
        local = [self.model_wrapped, *self._local_teachers()]  # in all processes at once: a trial has collectives
        with self._models_whole(all_of_them=True):
            self._tried = [ways_of(self.accelerator.unwrap_model(model), in_step=in_parts) for model in local]
        student = self._tried[0]
        if not student.trains:
            raise ArchitectureError(
                f"{type(self.accelerator.unwrap_model(self.model)).__name__} cannot be a student, only a teacher: its "
                f"backward pass fails ({student.reasons['trains']})."
            )

    def _trl_is_right(self, batch: dict[str, Any]) -> bool:
        """Whether TRL's own loss is that of the sequences without padding; one notice where it is not.

        Raises:
            TOPDError: it is not, and beta is one that our own loss does not have.
        """
        ways = self._tried or []
        rotated_by_length = [each for each in ways if each.switch is not None or each.end is not None]
        if all(each.trl == "always" for each in ways) and not rotated_by_length:
            return True
        wrong = torch.zeros_like(batch["prompt_mask"][0, 0])
        if any(each.trl != "always" for each in ways):
            wrong = (batch["prompt_mask"] == 0).any()
        if rotated_by_length:
            width = batch["prompt_mask"].shape[1] + batch["completion_mask"].shape[1]
            lengths = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()
            wrong = wrong | (not all(each.alike(lengths, width) for each in rotated_by_length))
        if all(each.trl != "never" for each in ways) and not bool(self.accelerator.gather(wrong.float()).any()):
            return True
        if self.args.beta not in (0, 1):
            raise TOPDError(
                f"TRL's loss is wrong for these models ({_why_trl_is_wrong(ways)}). Use beta 0 or 1, for which TOPD "
                "computes the loss itself."
            )
        if not self._warned_of_trl:
            self._warned_of_trl = True
            logger.warning(
                f"TRL's loss is wrong for these models ({_why_trl_is_wrong(ways)}); TOPD computes the same loss itself."
            )
        return False

    @contextmanager
    def _models_whole(self, all_of_them: bool = False) -> Iterator[None]:
        """The models that generate here (or both), held whole."""
        needed = self._server is None or self.args.embedding == "teacher_hidden"
        needed = needed or (all_of_them and self.teacher_model is not None)
        with ExitStack() as stack:
            for model in [self.model_wrapped, *([self.teacher_model] if needed else [])]:
                stack.enter_context(held_whole(model, self.accelerator))
            yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return super().prediction_step(*args, **kwargs)

    def _autocast(self) -> AbstractContextManager[None]:
        """`bf16` and `fp16` for what this project computes. TRL's own loss (`method: opd`) stays as TRL computes it."""
        if not (self.args.looks_ahead or self._in_one_pass() or self.teacher_model is None):
            return nullcontext()
        models = [self.accelerator.unwrap_model(model) for model in (self.model, *self._local_teachers())]
        return autocasting(models, self.accelerator)

    def _in_one_pass(self) -> bool:
        """Whether plain OPD uses our loss: with `opd_loss: auto`, images and tools keep TRL's, teacher prompts ours."""
        text = not (self._is_vlm or self.tools)
        return (self.args.opd_in_one_pass or self._prompted) and (text or self.args.opd_loss == "one_pass")

    def _local_teachers(self) -> list[Any]:
        return [] if self.teacher_model is None else [self.teacher_model]

    def _local(self, model: Any) -> LocalModel:
        return LocalModel(model, self._tokenizer.pad_token_id, self.eos_token_ids)


class OwnRollouts(BothModels):
    """What TRL's trainer leaves to the model's generation config and to the data is decided here.

    What the student computes while it samples is kept in `_sampling`, so that it need not read its rollouts again.
    """

    _sampling: SamplingStates | None = None
    _own_columns: tuple[str, ...] = (TEACHER_PROMPT,)
    """Columns of the dataset that `_own_entries` reads."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in self._own_columns if name not in columns]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        return super()._generate_and_score_completions(inputs if self._is_vlm else without_images(inputs))

    def _own_entries(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Entries [rollout, ...] of the batch that TRL does not know, checked before anything is sampled."""
        if not self._prompted:
            return {}
        prompts = [torch.tensor(ids) for ids in self._teacher_prompt_ids(inputs)]
        padded = (part.to(self.accelerator.device) for part in left_padded(prompts, self._tokenizer.pad_token_id))
        return dict(zip(TEACHER_PROMPT_ENTRIES, padded, strict=True))

    def _teacher_prompt_ids(self, inputs: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of what the teacher reads, by row. See docs/teacher_prompt.md.

        Raises:
            ContextError: a prompt, its response and a window do not fit the teacher's context.
            DataError: a row has no teacher's prompt where others have one, or it is empty.
        """
        own = [row.get(TEACHER_PROMPT) for row in inputs]
        if any(TEACHER_PROMPT in row for row in inputs):
            check_teacher_prompts([row["prompt"] for row in inputs], own, "the batch")
        ids = [
            teacher_prompt_ids(self._tokenizer, row["prompt"], theirs, self.args)
            for row, theirs in zip(inputs, own, strict=True)
        ]
        check_tokens(ids)
        for row, theirs in zip(inputs, ids, strict=True):
            what = f"The teacher's prompt for {row['prompt']!r:.160} of"
            self._check_context(theirs, self._contexts_of_teacher(row), what)
        return ids

    def _contexts_of_teacher(self, row: Mapping[str, Any]) -> dict[str, PreTrainedConfig]:
        """Configs of who reads the teacher's prompt of a row."""
        return contexts(None, self.teacher_model, self._server)

    def _check_context(self, ids: list[int], configs: Mapping[str, PreTrainedConfig], what: str) -> None:
        """Raise `ContextError` if a prompt with its response and a window does not fit these contexts."""
        window = self.args.window_length if self.args.looks_ahead else 0
        check_context(
            len(ids), self._tokenizer.decode(ids), self.max_completion_length or 0, window, configs, what=what
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Check prompts, which a stream gives batch by batch. At most one BOS; messages as in `plain_messages`."""
        check_prompts(prompts, "the batch")
        text = isinstance(prompts[0], str)
        with nullcontext() if text else explained_template(self.processing_class, len(prompts)):
            ids, images, fields = super()._tokenize_prompts(plain_messages(prompts))
        ids = [one_beginning(each, self._tokenizer) for each in ids]
        check_tokens(ids)
        teacher = (None, None) if self._prompted else (self.teacher_model, self._server)
        self._check_context(max(ids, key=len), contexts(self.model, *teacher), "A prompt of")
        return ids, images, fields

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's generation, by nothing of the student's generation config but its end tokens."""
        if self.use_vllm:
            return self._by_own_settings(*args, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        keeps = self.args.looks_ahead and self.model.training and not has_dropout(student)
        keeps = keeps and self.args.max_informative_tokens is None  # whose checks are forward passes in between
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

    def _by_own_settings(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        model, end = self.accelerator.unwrap_model(self.model), self._informative_end(prompt_ids)
        compactly = self.args.compact_sampling and self.model.training and self._rows_leave(end)
        fast = fast_decoding(model) if compactly else nullcontext()
        leaving = compact_sampling(model, self._sampling) if compactly else nullcontext()
        stopping = nullcontext() if end is None else stopping_by(model, end)
        with own_settings_only(model), without_checkpointing(model), stopping, self._limited(), fast, leaving:
            responses = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return responses if end is None else end.cut(responses)

    def _rows_leave(self, end: InformativeEnd | None) -> bool:
        """Whether rows that have ended may leave the batch. Say once why `compact_sampling` changes nothing."""
        why = self._why_rows_stay(end)
        if why is not None:
            logger.warning_once(f"compact_sampling has no effect here: {why}.")
        return why is None

    def _why_rows_stay(self, end: InformativeEnd | None) -> str | None:
        """Why rows that have ended must stay in the batch; None where they may leave."""
        cache = self.generation_config.cache_implementation
        if self.use_vllm:
            return "vLLM fills its batches itself"
        if end is not None:
            return "max_informative_tokens reads all rollouts while they are sampled"
        if cache not in (None, "dynamic"):
            return f"cache_implementation is {cache}"
        if self._student().ways.leaving:
            return None
        return f"the others of a batch of {type(self.accelerator.unwrap_model(self.model)).__name__} would change"

    def _informative_end(self, prompt_ids: list[list[int]]) -> InformativeEnd | None:
        """Where training's rollouts end early; None where they do not."""
        most = self.args.max_informative_tokens
        if most is None or not self.model.training:
            return None
        pair: tuple[DistilledModel, Any] = self._student(), self._teacher()  # `_check_rollouts`: both are here
        return InformativeEnd(*pair, prompt_ids, self._tokenizer, self.eos_token_ids, most)

    def _limited(self) -> AbstractContextManager[Any]:
        """The length that training's rollouts may have at this step."""
        limit = self.args.completion_limit(self.state.global_step)
        if limit == self.args.max_completion_length or not self.model.training:
            return nullcontext()
        if self.use_vllm:
            return patch.object(self.vllm_generation, "max_completion_length", limit)
        return patch.object(self.generation_config, "max_new_tokens", limit)

    def _check_rollouts(self) -> None:
        """Raise `TOPDError` where responses have no end, or teacher prompts or `max_informative_tokens` do not work.

        The latter needs both models whole here. Warn of dropout, which TRL leaves on while the student samples.
        """
        if self._tokenizer.eos_token_id is None:
            raise TOPDError(
                "The tokenizer has no EOS token, so responses could not end: set tokenizer.eos_token, and save it with "
                "the student."
            )
        if self.args.looks_ahead and not self.use_vllm and has_dropout(self.model):
            logger.warning(
                "The student has dropout, which is active while it samples. So the rollouts come from a perturbed "
                "student, and TOPD needs another forward pass over them. Set lora_dropout: 0.0, or the model's dropout "
                "to 0."
            )
        if self._prompted and (self._is_vlm or self.tools):
            raise TOPDError("A teacher prompt is not supported with images or tools yet: leave out one or the other.")
        if self.args.max_informative_tokens is None:
            return
        if self.teacher_model is None or self._is_vlm or self.tools or self._several_teachers:
            raise TOPDError(
                "max_informative_tokens works on text without tools, with the weights of one teacher: leave it out."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TOPDError("max_informative_tokens works in one process and under DDP: leave it out.")


def _why_trl_is_wrong(ways: list[Ways]) -> str:
    """In words: of logits that it does not scale, else of what it does where prompts differ in length."""
    heads = [each.reasons["trl"] for each in ways if each.reasons.get("trl", "").startswith("it does not read")]
    positions = "it passes no position ids and rotates all rows by the longest"
    return heads[0] if heads else f"where prompts of different lengths share a batch: {positions}"
