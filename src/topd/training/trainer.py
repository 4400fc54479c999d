"""`TOPDTrainer`: the step on TRL's `DistillationTrainer`. Plumbing, metrics and audit; the method is in `step.py`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from tqdm import tqdm
from trl import DistillationTrainer

from topd.errors import TOPDError
from topd.loading.dataset_checks import check_datasets, check_enough, check_prompts, check_tokens
from topd.loading.models import names_of
from topd.loading.pair import head_rows, prepared_models
from topd.loading.precision import watch_rounding
from topd.loading.sharding import shard_teacher, unsharded
from topd.loading.tokenizers import check_context
from topd.near_future import DistilledModel, Rollouts, fixed
from topd.near_future.sampling_states import SamplingStates, has_dropout
from topd.runs.checkpoints import check_writable
from topd.runs.console import STAGES, Stopwatch
from topd.runs.files import append_records
from topd.runs.non_finite import StopOnNonFiniteGradient, naming_nan_in_sampling, non_finite_error
from topd.runs.recorded import PAPER, RecordedTrainer
from topd.runs.records import AUDIT_FILE
from topd.runs.rollback import RollbackTrainer
from topd.teachers.from_options import check_without_weights, contexts, teacher_server, teacher_windows
from topd.training.audit import audit_records, save_options
from topd.training.batch import pack, rollouts_of, unpack
from topd.training.budget import CandidateBudget, budget_message
from topd.training.config import TOPDConfig
from topd.training.fork_threshold import LowLossQuartile
from topd.training.futures import NearFuture
from topd.training.gradient_ratio import EVERY, last_parameters
from topd.training.guided import Guided, guided_windows
from topd.training.metrics import near_future_metrics
from topd.training.models import BothModels
from topd.training.rollouts import OwnRollouts
from topd.training.step import look_ahead, opd_loss, score, topd_loss

logger = get_logger(__name__)


class TOPDTrainer(RecordedTrainer, RollbackTrainer, BothModels, OwnRollouts, DistillationTrainer):
    """On-policy distillation with near-future guidance (TOPD, arXiv:2606.00305).

    Takes what TRL's `DistillationTrainer` takes, with a `TOPDConfig`. With `method="opd"` (or a guidance weight of 0)
    every step equals `DistillationTrainer`'s, bit for bit.

    ```python
    trainer = TOPDTrainer(
        model="Qwen/Qwen3-0.6B", teacher_model="Qwen/Qwen3-1.7B", args=TOPDConfig("runs/mine"),
        train_dataset=dataset,  # a column "prompt": text or messages
    )
    trainer.train()
    ```

    Args:
        model: the student: a loaded model, a folder or a Hub name.
        teacher_model: the same; with adapters (`peft_config`, or a `PeftModel`) it may be the student itself: then the
            base without the adapter is the teacher, on the same weights. None: all of it is behind
            `teacher_window_server` (docs/remote_teachers.md).

    Raises:
        ContextError: where a prompt, its response and a window do not fit a model's context.
        ServerError: its server cannot be used or has gone away; the steps so far are saved.
        TokenizerMismatchError: where the tokenizers differ; a loaded model's is looked for where the model came from.
        NonFiniteError: where a loss or gradient is NaN or infinite; before the optimizer moves.
    """

    _tag_names = ["trl", "topd", "on-policy-distillation"]
    _name = "TOPD"
    _paper = PAPER

    args: TOPDConfig
    model: Any
    teacher_model: Any
    _several_teachers = False

    def __init__(
        self, model: Any, teacher_model: Any = None, args: TOPDConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, *rest: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._names = names_of(student=model, teacher=teacher_model)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
            args = TOPDConfig(f"{Path(name).name}-TOPD")
        if args.teachers and not self._several_teachers:
            raise TOPDError("TOPDTrainer has one teacher; args.teachers needs MOPDTrainer (training.several_teachers).")
        check_datasets(train_dataset, eval_dataset)
        check_writable(args)
        if teacher_model is None:
            check_without_weights(args)
        server = teacher_server(args, teacher_model is not None)  # a wrong address is told before weights are loaded
        init_kwargs = args.model_init_kwargs, args.teacher_model_init_kwargs
        tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's
        adapters = kwargs.get("peft_config"), kwargs.get("quantization_config")
        pair = prepared_models(model, teacher_model, args, tokenizer, *adapters)
        super().__init__(
            pair.student, pair.teacher, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs
        )
        args.model_init_kwargs, args.teacher_model_init_kwargs = init_kwargs
        pair.report(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if args.looks_ahead and (self._is_vlm or self.tools):
            raise ValueError(
                f"method={args.method} works on text without tools so far; use method=opd for images or tools."
            )
        if self.is_fsdp_enabled and teacher_model is not None:
            self.teacher_model = shard_teacher(self.teacher_model, self.accelerator)
        if server is not None:
            rows = head_rows(self.model)
            self._use_server(teacher_windows(server, args, self._tokenizer, self.eos_token_ids, rows))
        self._stage = Stopwatch()
        self._sampling: SamplingStates | None = None
        self._budget = (
            CandidateBudget(args.max_overhead, args.recalibration_steps)
            if args.max_overhead and args.looks_ahead
            else None
        )
        self._step_size = (0.0, 0.0, 0.0)  # response tokens, rollouts, candidates
        self._guidance_loss, self._unseen = 0.0, 0.0
        self._warned = False
        by_low_loss = args.looks_ahead and args.fork_rule == "low_loss_quartile"
        self._quartile = LowLossQuartile(args.recalibration_steps) if by_low_loss else None
        self.add_callback(StopOnNonFiniteGradient(self._stop_on))
        watch_rounding(self)

    # Rollouts, then the near future

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        check_prompts(prompts, "the batch")  # a stream's rows are not seen before
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        check_tokens(prompt_ids)
        longest = max(prompt_ids, key=len)
        check_context(
            len(longest), self._tokenizer.decode(longest), self.max_completion_length or 0, self._longest_window(),
            contexts(self.model, self.teacher_model, self._server),
        )  # fmt: skip
        return prompt_ids, images, fields

    def _longest_window(self) -> int:
        return self.args.window_length if self.args.looks_ahead else 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; what the student computes while sampling is kept for looking ahead."""
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        with unsharded(student):
            if not self.args.looks_ahead or not self.model.training or has_dropout(student):
                return self._generate_in_groups(*args, **kwargs)
            self._sampling = SamplingStates()
            with self._sampling.keeping(student):
                return self._generate_in_groups(*args, **kwargs)

    def _generate_in_groups(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """TRL's generation; prompts that must not share a batch go one group after the other."""
        lengths = [len(ids) for ids in prompt_ids]
        if self._is_vlm or len(set(lengths)) == 1:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        ways = self._student().ways
        groups = ways.together(lengths, [-n for n in lengths], growth=self.max_completion_length or 0)
        responses: list[Any] = [None] * len(lengths)
        for group in groups:
            sampled = super()._generate_single_turn([prompt_ids[row] for row in group], *args, **kwargs)
            for row, response in zip(group, sampled, strict=True):
                responses[row] = response
        return responses

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._is_vlm:
            self._try_ways()
        nan = naming_nan_in_sampling(self.state.global_step + 1, str(self.args.output_dir))
        with self._stage("rollout"), nan:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not (self.args.looks_ahead and self.model.training):
            return batch | self._for_opd(batch)
        self._step_size = (float(batch["completion_mask"].sum()), float(len(batch["completion_mask"])), 0.0)
        at_most = self._budget.at_most() if self._budget else None
        if at_most == 0:  # a step of plain OPD, to compare with
            return batch | self._for_opd(batch)

        rollouts, teacher = rollouts_of(batch), self._teacher()
        kept, self._sampling = self._student().sampled(rollouts, self._sampling, self._generates_own_windows()), None
        with self._models_whole(), self.compute_loss_context_manager():
            future = look_ahead(
                rollouts, self._student(), teacher, self.args, self._stage, gather=self._gather_ragged,
                process=self.accelerator.process_index, kept=kept, at_most=at_most,
                quartile=self._quartile, step=self.state.global_step,
            )  # fmt: skip
        self._warn_without_distances(future)
        self._step_size = (*self._step_size[:2], float(len(future.rows)))
        self._stop_unless_finite(future.token_loss, rollouts)
        batch |= {"weights": future.weights, "entropy": future.entropy, "teacher_hidden": future.teacher_hidden}

        guided = None
        if self.args.guides:
            guided = guided_windows(future, rollouts, self.args)
            if self.args.guidance_context == "teacher" and self.args.teacher_context_loss != "cross_entropy":
                with self._stage("scoring"), self.compute_loss_context_manager():
                    guided = replace(guided, teacher_hidden=teacher.hidden_in_windows(rollouts, guided.branches))
            num_forks = self.accelerator.gather(guided.targets.guided.any(-1).sum()).sum()
            batch |= pack(guided) | {"num_forks": num_forks}

        self._record(future, guided, rollouts)
        return batch

    def _for_opd(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What our own loss of plain OPD needs; nothing where TRL's is used."""
        one_pass = self.args.opd_in_one_pass and self.model.training
        if self.teacher_model is not None and not one_pass and (self._is_vlm or self._trl_is_right(batch)):
            return {}
        with self._stage("scoring"), self.compute_loss_context_manager():
            return {"teacher_hidden": self._teacher().hidden(rollouts_of(batch))}

    def _generates_own_windows(self) -> bool:
        return self.args.student_window != "rollout"

    def _measures_gradients(self) -> bool:
        """Whether this step estimates how strong guidance is; with one GPU or CPU process per model copy."""
        return self.args.guides and self.model.training and self.state.global_step % EVERY == 0

    def _warn_without_distances(self, future: NearFuture) -> None:
        distances = self._gather_ragged(future.transport.distance)
        if self._warned or len(distances) == 0 or bool(distances.isfinite().any()):
            return
        self._warned = True
        hint = "raise entropic_epsilon or use transport_solver=exact" if self.args.transport_solver != "exact" else (
            "check that both models' embeddings are finite and that windows are not empty"
        )  # fmt: skip
        logger.warning(
            f"Step {self.state.global_step + 1}: no candidate has a transport distance, so nothing is a fork and the "
            f"step is plain OPD; {hint}. This is reported once."
        )

    def _gather_ragged(self, values: Tensor) -> Tensor:
        """Values of all processes, however many each has."""
        if self.accelerator.num_processes == 1:
            return values
        padded = self.accelerator.pad_across_processes(values, pad_index=torch.nan)
        return self.accelerator.gather(padded)  # NaN marks what is not there, as it marks unknown distances

    # The loss

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if "teacher_hidden" not in inputs:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        rollouts, teacher = rollouts_of(inputs), self._teacher()
        student = DistilledModel(unwrapped_student, fixed(self._local(unwrapped_student)), temperature=self.temperature)
        mask = rollouts.loss_mask.bool()
        if "weights" not in inputs:  # plain OPD
            num_tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            result = opd_loss(rollouts, student, teacher, inputs["teacher_hidden"], self.args, num_tokens)
            entropy = result.nll
        else:
            processes = self.accelerator.num_processes  # DDP averages gradients over processes; these sums are global
            result = topd_loss(
                rollouts, student, teacher, inputs["teacher_hidden"], inputs["weights"], unpack(inputs), self.args,
                num_tokens=num_items_in_batch,
                num_forks=inputs["num_forks"].clamp(min=1) / processes if self.args.guides else torch.tensor(1),
                measured=last_parameters(student.backbone) if self._measures_gradients() else None,
            )  # fmt: skip
            inputs["guidance_loss"] = result.trajectory
            if result.gradient_ratio is not None:
                inputs["gradient_ratio"] = result.gradient_ratio
            entropy = inputs["entropy"][mask].sum()
        if result.unseen is not None:
            inputs["unseen"] = result.unseen.sum() / (num_items_in_batch if self.model.training else mask.sum())
        return result.loss, entropy, mask.sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self._stage("loss"):
            outputs = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            loss = outputs[0] if return_outputs else outputs
            self._stop_unless_finite(loss.detach(), rollouts_of(inputs))
            if "guidance_loss" in inputs:
                self._guidance_loss += float(self.accelerator.gather(inputs.pop("guidance_loss")).mean())
            if "gradient_ratio" in inputs:
                self._metrics["train"]["guidance/grad_ratio"].append(float(inputs.pop("gradient_ratio")))
            if "unseen" in inputs:
                self._unseen += float(self.accelerator.gather(inputs.pop("unseen")).mean())
        return outputs

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        before = sum(self._stage.seconds.values())
        with self._stage("whole"):
            output = super().training_step(model, inputs, num_items_in_batch)
        whole = self._stage.seconds.pop("whole")
        self._stage.seconds["backward"] += whole - (sum(self._stage.seconds.values()) - before)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._finish_step_metrics()
        return output

    # A NaN stops the run

    def _stop_unless_finite(self, loss: Tensor, rollouts: Rollouts) -> None:
        self._last_batch = rollouts
        finite = self.accelerator.gather(loss.isfinite().all().float())
        if not bool(finite.all()):
            self._stop_on("loss")

    def _stop_on(self, what: str) -> None:
        """Raise, naming the rollouts at fault: where the token loss is not finite, else where it is largest."""
        rollouts = self._last_batch
        student, teacher = self._student(), self._teacher()
        with self.compute_loss_context_manager():
            states = student.hidden(rollouts), teacher.hidden(rollouts)
            token_loss = score(rollouts, states[0], student, states[1], teacher, self.args).kl
        mask = rollouts.loss_mask
        raise non_finite_error(
            what,
            self.state.global_step + 1,
            str(self.args.output_dir),
            rollouts,
            token_loss.sum(-1) / mask.sum(-1).clamp(min=1),
            self._tokenizer.decode,
        )

    # Metrics and audit

    def _record(self, future: NearFuture, guided: Guided | None, rollouts: Rollouts) -> None:
        for name, value in near_future_metrics(future, guided, rollouts, self._gather_ragged).items():
            self._metrics["train"][name].append(value)
        due = self.args.audit_steps and self.state.global_step % self.args.audit_steps == 0
        if due and self.accelerator.is_main_process:
            records = audit_records(
                rollouts, future, self._tokenizer,
                step=self.state.global_step + 1, method=self.args.method, limit=self.args.audit_rollouts,
            )  # fmt: skip
            append_records(records, self._folder / AUDIT_FILE)

    def _finish_step_metrics(self) -> None:
        seconds = self._stage.take()
        if self._budget is not None:
            self._keep_to_budget(self._budget, seconds)
        for name in STAGES:
            if name in seconds:
                self._metrics["train"][f"seconds/{name}"].append(seconds[name])
        if self.args.guides:
            self._metrics["train"]["guidance/loss"].append(self._guidance_loss)
            self._guidance_loss = 0.0
        if self.teacher_model is None:
            self._metrics["train"]["token_loss/unseen"].append(self._unseen)
            self._unseen = 0.0

    def _keep_to_budget(self, budget: CandidateBudget, seconds: dict[str, float]) -> None:
        """Tell the budget what the step took, on average over processes, so that all decide alike."""
        numbers = torch.tensor([*(seconds.get(name, 0.0) for name in STAGES), *self._step_size], dtype=torch.float64)
        mean = self.accelerator.reduce(numbers.to(self.accelerator.device), reduction="mean").tolist()
        was_measuring = budget.measuring
        budget.record(dict(zip(STAGES, mean, strict=False)), *mean[len(STAGES) :])
        if budget.model is None:
            return
        tokens, rollouts, candidates = mean[len(STAGES) :]
        self._metrics["train"]["budget/predicted_overhead"].append(budget.model.overhead(candidates / tokens))
        if was_measuring and self.accelerator.is_main_process:
            tqdm.write(f"topd: {budget_message(budget, tokens / rollouts)}")  # above the progress bar

    def _own_state(self) -> dict[str, Any]:
        parts = {"budget": self._budget, "quartile": self._quartile}
        return super()._own_state() | {name: asdict(part) for name, part in parts.items() if part is not None}

    def _restore_own_state(self, state: dict[str, Any]) -> None:
        super()._restore_own_state(state)
        if self._quartile and "quartile" in state:
            self._quartile = LowLossQuartile(**state["quartile"] | {"every": self._quartile.every})
        if self._budget and "budget" in state:
            self._budget = self._budget.restored(state["budget"])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_enough(self.train_dataset, self.args)
        return super().train(*args, **kwargs)

    def _trained(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_main_process:
            save_options(self.args)
        return super()._trained(*args, **kwargs)
