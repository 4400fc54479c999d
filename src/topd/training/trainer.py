"""`TOPDTrainer`: the step on TRL's `DistillationTrainer`. Plumbing only: the method is in `step.py`."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer

from topd.errors import TOPDError
from topd.evaluation.while_training import HeldOut, HeldOutAccuracy, check_best_metric, problems_of
from topd.loading.adapters import is_adapter
from topd.loading.dataset_checks import check_columns, check_datasets, check_enough
from topd.loading.models import names_of
from topd.loading.pair import head_rows, prepared_models
from topd.loading.precision import watch_rounding
from topd.loading.sharding import check_one_gpu, shard_teacher
from topd.loading.teacher_prompts import SAME_PROMPT, SELF, check_options, has_teacher_prompts
from topd.loading.tokenizers import tokenizer_of
from topd.logs import get_logger
from topd.near_future import DistilledModel, Rollouts
from topd.runs.checkpoints import check_writable
from topd.runs.console import Stopwatch
from topd.runs.non_finite import StopOnNonFiniteGradient, naming_nan_in_sampling, non_finite_error
from topd.runs.recorded import PAPER, RecordedTrainer
from topd.runs.reused_rollouts import ReusedRollouts
from topd.runs.rollback import RollbackTrainer
from topd.teachers.from_options import check_without_weights, teacher_server
from topd.teachers.server_windows import connect
from topd.training.batch import TEACHER_PROMPT_ENTRIES, in_order, pack, pack_states, rollouts_of, unpack, unpack_states
from topd.training.budget import CandidateBudget
from topd.training.config import TOPDConfig
from topd.training.losses import RATIO_EVERY, LossInputs, guided_windows, last_parameters, sampled_log_probs
from topd.training.method import LowLossQuartile, Method, StepContext, random_tokens
from topd.training.models import OwnRollouts
from topd.training.step import look_ahead, opd_loss, score, topd_loss
from topd.training.step_log import StepLog, save_options

logger = get_logger(__name__)

KIND, OPD, TOPD = "topd_step", "opd", "topd"
"""Entry of the batch that says which loss a step has; without it, TRL's own."""
OLD = "old_log_probs"
"""Entry [rollout, position] of the batch: log p of the sampled tokens under the student that sampled them."""


class TOPDTrainer(
    RecordedTrainer, RollbackTrainer, StepLog, OwnRollouts, ReusedRollouts, HeldOutAccuracy, DistillationTrainer
):  # fmt: skip
    """On-policy distillation with near-future guidance (TOPD, arXiv:2606.00305).

    Takes what TRL's `DistillationTrainer` takes, with a `TOPDConfig`. With `method="opd"` (or a guidance weight of 0)
    and `opd_loss="trl"` every step equals `DistillationTrainer`'s, bit for bit; by default it does to rounding.

    ```python
    trainer = TOPDTrainer(
        model="Qwen/Qwen3-0.6B", teacher_model="Qwen/Qwen3-1.7B", args=TOPDConfig("runs/mine"),
        train_dataset=dataset,  # a column "prompt": text or messages
    )
    trainer.train()
    ```

    Args:
        model: the student: a loaded model, a folder or a Hub name. The adapter in a folder of PEFT is trained further.
        teacher_model: the same; a folder of PEFT is its base with the adapter. If the student has adapters (a folder,
            `peft_config`, or a `PeftModel`), the teacher may be the student itself, its base, or another adapter on
            that base: then both are on one set of weights. None: all of it is behind `teacher_model_server_url`
            (docs/remote_teachers.md).

    Raises:
        ContextError: where a prompt, its response and a window do not fit a model's context.
        ServerError: its server cannot be used or has gone away; the steps so far are saved.
        TokenizerMismatchError: where the tokenizers differ; a loaded model's is looked for where the model came from.
        NonFiniteError: where a loss or gradient is NaN or infinite; before the optimizer moves.
    """

    _tag_names = ["trl", "topd", "on-policy-distillation"]
    _name = "TOPD"
    _paper = PAPER

    def __init__(
        self, model: Any, teacher_model: Any = None, args: TOPDConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, *rest: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._names = names_of(student=model, teacher=teacher_model)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
            args = TOPDConfig(f"{Path(name).name}-TOPD")
        if not isinstance(args, TOPDConfig):
            raise TOPDError(f"args is a {type(args).__name__}; pass a TOPDConfig, which takes the same options.")
        check_one_gpu(args)
        if args.teachers and not self._several_teachers:
            raise TOPDError("TOPDTrainer has one teacher; args.teachers needs MOPDTrainer (training.several_teachers).")
        check_datasets(train_dataset, eval_dataset)
        check_writable(args)
        problem_set = problems_of(args)
        if problem_set is not None:
            check_best_metric(args, eval_dataset)
        self._prompted = has_teacher_prompts(args, train_dataset)
        if self._prompted:
            check_options(args)
        elif isinstance(teacher_model, str) and teacher_model == SELF:
            raise TOPDError(SAME_PROMPT)
        if teacher_model is None:
            check_without_weights(args)
        if processing_class is None and is_adapter(model):  # TRL would look for it at the base
            processing_class = tokenizer_of(os.fspath(model), args.trust_remote_code)
        server = teacher_server(args, teacher_model is not None)  # reports a wrong address before weights are loaded
        init_kwargs = args.model_init_kwargs, args.teacher_model_init_kwargs
        tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's
        adapters = kwargs.get("peft_config"), kwargs.get("quantization_config")
        pair = prepared_models(model, teacher_model, args, tokenizer, *adapters)
        evaluated = [] if eval_dataset is None and problem_set is not None else eval_dataset
        super().__init__(pair.student, pair.teacher, args, train_dataset, evaluated, processing_class, *rest, **kwargs)
        self.eval_dataset = eval_dataset  # transformers does not evaluate without one: only the problems are answered
        if problem_set is not None:
            self._held_out = HeldOut.of(problem_set, args, self._tokenizer, self.model.config)
        args.model_init_kwargs, args.teacher_model_init_kwargs = init_kwargs
        pair.report(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if (args.looks_ahead or args.prefix_weight_max is not None) and (self._is_vlm or self.tools):
            raise ValueError(
                f"method={args.method} does not support images or tools yet; use method=opd for these, "
                "without prefix_weight_max."
            )
        self._check_rollouts()
        if self.is_fsdp_enabled and teacher_model is not None:
            self.teacher_model = shard_teacher(self.teacher_model, self.accelerator)
        if server is not None:
            ends, served_as = self.eos_token_ids, args.teacher_server_model
            self._use_server(connect(server, self._tokenizer, ends, served_as, vocabulary=head_rows(self.model)))
        self._stage = Stopwatch()
        self._measure_anew()
        self.add_callback(StopOnNonFiniteGradient(self._stop_on))
        watch_rounding(self)

    def _measure_anew(self) -> None:
        """Neither the fork threshold nor the budget of an earlier `train()` is used."""
        ahead, every, limit = self.args.looks_ahead, self.args.recalibration_steps, self.args.max_overhead
        self._budget = CandidateBudget(limit, every) if ahead and limit else None
        self._quartile = LowLossQuartile(every) if ahead and self.args.fork_rule == "low_loss_quartile" else None

    # Rollouts, then the near future

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        for row in inputs:
            check_columns(list(row), "the batch")
        if not self._is_vlm:
            self._try_ways()
        nan = naming_nan_in_sampling(self.state.global_step + 1, str(self.args.output_dir))
        with self._stage("rollout"), nan:
            own = self._own_entries(inputs)
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs) | own
        if self.model.training and self.args.token_share < 1:
            batch |= self._random_share(batch)
        if self.model.training and self._share_of_step < 1:
            batch["num_items_in_batch"] = batch["num_items_in_batch"] * self._share_of_step
        if not (self.args.looks_ahead and self.model.training):
            return batch | self._for_opd(batch)
        self._step_size = (float(batch["completion_mask"].sum()), float(len(batch["completion_mask"])), 0.0)
        max_candidates = self._budget.max_candidates() if self._budget else None
        if max_candidates == 0:  # a step of plain OPD, to compare with
            self._sampling = None
            return batch | self._for_opd(batch)

        rollouts, method = rollouts_of(batch), Method.of(self.args)
        student, teacher = self._student(), self._teacher()
        sampled, self._sampling = student.sampled(rollouts, self._sampling, method.student_window != "rollout"), None
        context = StepContext(
            self._stage, self._gather_ragged, self.accelerator.process_index, sampled, max_candidates,
            self._quartile, self._generations, self.args.window_memory,
        )  # fmt: skip
        with self._models_whole(), self.compute_loss_context_manager():
            future = look_ahead(rollouts, student, teacher, method, context)
        look = future.look
        self._warn_without_distances(future)
        self._step_size = (*self._step_size[:2], float(len(future.candidates)))
        self._stop_unless_finite(look.token_loss, rollouts)
        batch |= pack_states(look.teacher_states) | {"weights": future.weights, "entropy": look.entropy}
        if self.args.prefix_weight_max is not None:
            batch[OLD] = -look.student_nll

        guided = None
        if method.guides:
            guided = guided_windows(future.chosen, method)
            if method.guidance_context == "teacher":
                with self._stage("scoring"), self.compute_loss_context_manager():
                    theirs = teacher.hidden_in_windows(rollouts.as_teacher_reads, guided.branches)
                guided = replace(guided, teacher_hidden=theirs)
            num_forks = self.accelerator.gather(guided.targets.guided.any(-1).sum()).sum().clamp(min=1)
            batch |= pack(guided) | {"num_forks": num_forks * self._share_of_step}

        self._record(future, guided, rollouts, method)
        return batch | {KIND: [TOPD] * len(rollouts)}

    def _for_opd(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What our own loss of plain OPD needs; nothing where TRL's is used."""
        one_pass = (self._in_one_pass() and self.model.training) or TEACHER_PROMPT_ENTRIES[0] in batch
        if self.teacher_model is not None and not one_pass and (self._is_vlm or self._trl_is_right(batch)):
            return {}
        with self._stage("scoring"), self.compute_loss_context_manager():
            rollouts = rollouts_of(batch)
            theirs = self._teacher().prefill(rollouts.as_teacher_reads, keep_prefix=False)
            entries: dict[str, Any] = pack_states(theirs.states)
            if self.args.prefix_weight_max is not None and self.model.training:
                student = self._student()
                hidden = student.prefill(rollouts, keep_prefix=False).hidden[rollouts.loss_mask.bool()]
                entries[OLD] = sampled_log_probs(hidden, student.head(), rollouts)
        return entries | {KIND: [OPD] * len(rollouts)}

    def _random_share(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Entries of TRL's batch, by which either loss covers `token_share` of the tokens and is their mean."""
        mask = rollouts_of(batch).loss_mask
        seed = self.args.seed, self._generations
        kept = random_tokens(mask.bool(), self.args.token_share, seed, self.accelerator.process_index * len(mask))
        return {"tool_mask": kept.to(mask.dtype), "num_items_in_batch": self.accelerator.gather(kept.sum()).sum()}

    def _in_order(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of similar length in a micro-batch: our own loss reads rows as wide as the longest (our choice).

        The rows of an optimizer step stay in it, and its loss is their sum, so only rounding changes.
        """
        if KIND not in batch:
            return batch
        update = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        lengths = rollouts_of(batch).lengths
        step = torch.arange(len(lengths), device=lengths.device) // update
        return in_order(batch, (step * (lengths.max() + 1) + lengths).argsort(stable=True))

    def _measures_gradients(self) -> bool:
        """Whether this step estimates how strong guidance is; with one GPU or CPU process per model copy."""
        due = self.args.guides and self.model.training and self.state.global_step % RATIO_EVERY == 0
        checkpointing: Any = (self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs) or {}
        return due and not checkpointing.get("use_reentrant")  # which takes whole backward passes only

    # The loss

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        kind = inputs[KIND][0] if KIND in inputs else None
        if kind is None:  # TRL's own loss
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        rollouts, teacher = rollouts_of(inputs), self._teacher()
        student = DistilledModel(unwrapped_student, self._local(unwrapped_student), temperature=self.temperature)
        mask, method, states = rollouts.loss_mask.bool(), Method.of(self.args), unpack_states(inputs)
        if kind == OPD:
            num_tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            result = opd_loss(
                rollouts, student, teacher, LossInputs(states, num_tokens, old_log_probs=inputs.get(OLD)), method
            )
            entropy = result.nll
        else:
            processes = self.accelerator.num_processes  # DDP averages gradients over processes; these sums are global
            parts = LossInputs(
                states, num_items_in_batch, inputs["weights"], unpack(inputs),
                num_forks=inputs["num_forks"] / processes if method.guides else None,
                measured=last_parameters(student.backbone) if self._measures_gradients() else None,
                old_log_probs=inputs.get(OLD),
            )  # fmt: skip
            result = topd_loss(rollouts, student, teacher, parts, method)
            if result.trajectory is not None:
                inputs["guidance_loss"] = result.trajectory
            if result.gradient_ratio is not None:
                inputs["gradient_ratio"] = result.gradient_ratio
            entropy = inputs["entropy"][mask].sum()
        if result.outside_top_k is not None:
            total = result.outside_top_k.sum()
            inputs["outside_top_k"] = total / (num_items_in_batch if self.model.training else mask.sum())
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
            if "outside_top_k" in inputs:
                self._outside_top_k += float(self.accelerator.gather(inputs.pop("outside_top_k")).mean())
        return outputs

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
        with torch.no_grad(), self.compute_loss_context_manager():
            token_loss = score(rollouts, student, teacher, Method.of(self.args))[0].kl
        mask = rollouts.loss_mask
        raise non_finite_error(
            what,
            self.state.global_step + 1,
            str(self.args.output_dir),
            rollouts,
            token_loss.sum(-1) / mask.sum(-1).clamp(min=1),
            self._tokenizer.decode,
        )

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
        self._measure_anew()
        return super().train(*args, **kwargs)

    def _trained(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_main_process:
            save_options(self.args)
        return super()._trained(*args, **kwargs)
