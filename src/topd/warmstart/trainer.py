"""`WarmStartTrainer`: forward KL and cross-entropy on teacher solutions, on TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

from topd.algorithm import LikelihoodTerms
from topd.errors import TOPDError
from topd.loading.adapters import is_adapter, weights_of
from topd.loading.by_name import SAFE
from topd.loading.dataset_checks import check_one, check_solutions, evaluations
from topd.loading.models import load_config, model_to_train, names_of
from topd.loading.pair import load, loaded_teacher
from topd.loading.precision import watch_rounding
from topd.loading.shared_base import refuse_two_adapters
from topd.logs import get_logger
from topd.near_future.distilled_model import loss_on_device
from topd.near_future.model_parts import backbone_of, end_token_ids, output_head
from topd.runs.checkpoints import check_writable
from topd.runs.non_finite import StopOnNonFiniteGradient, non_finite_error
from topd.runs.recorded import RecordedTrainer
from topd.runs.resumable_trainer import ResumableTrainer
from topd.warmstart.config import WarmStartConfig
from topd.warmstart.tokens import as_generated, check_that_it_can_stop

logger = get_logger(__name__)


class WarmStartTrainer(RecordedTrainer, ResumableTrainer, SFTTrainer):
    """Stage 1 of the paper (appendix B.1): the student learns from solutions that the teacher wrote.

    The loss, in nats per completion token, is `kd_ratio` x KL(teacher || student) over the whole vocabulary +
    (1 - `kd_ratio`) x cross-entropy. Both are computed from hidden states in one pass, tile by tile: a tokens x
    vocabulary matrix is never stored. With `kd_ratio=0` every step is `SFTTrainer`'s.

    ```python
    from topd.warmstart import WarmStartConfig, WarmStartTrainer

    trainer = WarmStartTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-1.7B",
        args=WarmStartConfig("runs/warm", packing=True),
        train_dataset=dataset,  # columns "prompt" and "completion": text, or messages
    )
    trainer.train()
    ```

    Raises:
        TOPDError: no solution trains an end token: the student would not learn to stop.
        TokenizerMismatchError: the teacher's tokenizer differs from the student's, or its output head is smaller.
        NonFiniteError: a gradient is NaN or infinite; raised before the optimizer steps.
        ValueError: the loss does not support an option: see the messages.
    """

    _tag_names = ["trl", "topd", "distillation"]
    _name = "TOPD warm start"

    args: WarmStartConfig
    model: Any

    def __init__(
        self, model: Any, teacher_model: Any = None, args: WarmStartConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        args = args or WarmStartConfig("warm-start")
        if not isinstance(args, WarmStartConfig):
            raise TOPDError(f"args is a {type(args).__name__}; pass a WarmStartConfig, which takes the same options.")
        self._names, self._given_dataset = names_of(student=model, teacher=teacher_model), kwargs.get("train_dataset")
        check_one(self._given_dataset)
        evaluations(kwargs.get("eval_dataset"))
        if not (rest or kwargs.get("formatting_func")):
            check_solutions(self._given_dataset, args.dataset_text_field)
        check_writable(args)
        model, teacher_model = model_to_train("student", model), model_to_train("teacher", teacher_model)
        if args.distils and teacher_model is None:
            raise ValueError("kd_ratio > 0 needs a teacher_model: a name, a folder, or a loaded model.")
        init_kwargs: Any = args.model_init_kwargs
        if isinstance(model, str):
            revision = (init_kwargs or {}).get("revision")
            load_config(model, trust_remote_code=args.trust_remote_code, revision=revision)
        self._generation = _generation_config(model, args)
        if is_adapter(model):
            refuse_two_adapters(model, kwargs.get("peft_config"))
            model, args.model_init_kwargs = load(model, args, SAFE | (init_kwargs or {}), trained=True), None
        super().__init__(model, args, *rest, **kwargs)
        args.model_init_kwargs = init_kwargs
        dataset: Any = self.train_dataset
        labelled = dataset is not None and "labels" in (dataset.column_names or ["labels"])
        if labelled and (note := check_that_it_can_stop(dataset, self._tokenizer, self._ends(), args.max_length)):
            logger.warning(note)
        self.add_callback(StopOnNonFiniteGradient(self._stop_on))
        watch_rounding(self)
        self.teacher_model: Any = None
        if args.distils:
            self._refuse_unsupported()
            self._forward_redirection = _ForwardRedirection()
            self.teacher_model = loaded_teacher(self, teacher_model, args.teacher_model_revision)

    def _refuse_unsupported(self) -> None:
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError("kd_ratio > 0 does not work with context or sequence parallelism; use packing instead.")
        if self.aux_loss_enabled:
            raise ValueError(
                "kd_ratio > 0 has no load-balancing loss for a mixture-of-experts student: set router_aux_loss_coef=0."
            )
        if self.compute_loss_func is not None or self._is_vision_dataset:
            raise ValueError("kd_ratio > 0 works on text, with its own loss: no images, no compute_loss_func.")

    def _prompts(self) -> Any:
        return self.train_dataset if self._given_dataset is None else self._given_dataset

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """TRL's, with solutions as the token ids of generation, and the options of the chat template."""
        options: Any = args.chat_template_kwargs
        if options and "input_ids" not in next(iter(dataset)):  # TRL has a column for them, no option
            name = "chat_template_kwargs"
            dataset = dataset.map(lambda row: {name: options | (row.get(name) or {})})
        if not (args.assistant_only_loss or self._is_vision_dataset):
            template = {} if self.chat_template is None else {"chat_template": self.chat_template}
            dataset = as_generated(dataset, self._tokenizer, self._ends(), self.completion_only_loss, **template)
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **kwargs)

    def _ends(self) -> list[int]:
        return end_token_ids(self._generation, self._tokenizer)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss, with `SFTTrainer`'s denominator and scaling."""
        if not self.args.distils:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self.accelerator.unwrap_model(model)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        num_tokens = torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss, sums = self._forward_redirection(model, student, self._distil, student, inputs, num_tokens)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages over processes
        mask = inputs.get("attention_mask")
        read = inputs["input_ids"].numel() if mask is None else mask.sum()
        self._record(torch.cat([sums, torch.stack([tokens, torch.as_tensor(read, device=tokens.device)]).to(sums)]))
        return (loss, None) if return_outputs else loss

    def _distil(self, student: Any, inputs: dict[str, Any], num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the detached sums (forward KL, cross-entropy). Runs in the wrapped forward pass."""
        labels = inputs["labels"][:, 1:]
        mask = labels != -100
        ours = self._states(student, inputs)[mask]
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            theirs = self._forward_redirection(self.teacher_model, teacher, self._states, teacher, inputs)[mask]
        ratio, each = self.args.kd_ratio, ours.new_ones(len(ours), dtype=torch.float32) / num_tokens
        tokens = LikelihoodTerms(torch.arange(len(ours), device=ours.device), labels[mask], (1 - ratio) * each)
        result = loss_on_device(
            ours, output_head(student), theirs, output_head(teacher), ratio * each,
            tokens if ratio < 1 else None, "forward",
        )  # fmt: skip
        return result.loss, torch.stack([result.token_loss.sum(), result.nll.sum()])

    def _states(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """[row, position, width] states that predict each token of a row but the first; also for packed rows.

        Under autocast, which the redirected forward pass has left.
        """
        device, given = inputs["input_ids"].device.type, {k: v for k, v in inputs.items() if k != "labels"}
        with self.accelerator.autocast():
            states: Tensor = backbone_of(model)(**given, use_cache=False).last_hidden_state[:, :-1]
            return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states

    def _record(self, sums: Tensor) -> None:
        """Log metrics from the sums of a process: forward KL, cross-entropy, completion tokens, input tokens."""
        mode = "train" if self.model.training else "eval"
        kl, nll, tokens, inputs = self.accelerator.gather(sums[None]).sum(0).tolist()
        self._metrics[mode]["forward_kl"].append(kl / max(tokens, 1))
        if self.args.kd_ratio < 1:
            self._metrics[mode]["cross_entropy"].append(nll / max(tokens, 1))
        if mode == "train":
            self._total_train_tokens += int(inputs) // (self._tp_size or 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _stop_on(self, what: str) -> None:
        raise non_finite_error(what, self.state.global_step + 1, str(self.args.output_dir), None, None, None)


def _generation_config(model: Any, args: WarmStartConfig) -> GenerationConfig | None:
    """The student's generation config, also before it is loaded; None if there is none."""
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    given: Any = args.model_init_kwargs or {}
    try:
        return GenerationConfig.from_pretrained(weights_of(model), revision=given.get("revision") or "main")
    except OSError:
        return None
