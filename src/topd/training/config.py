"""`TOPDConfig`: every choice that the method leaves open, each with its default and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from trl import DistillationConfig

from topd.algorithm.forks import ForkRule, Selection
from topd.algorithm.guidance import TargetKind
from topd.algorithm.transport import GroundCost
from topd.loading.options import check_kinds, rename_dtype
from topd.teachers.server_address import without_secrets
from topd.training.method import Embedding, Method, Ranking, Solver, StudentWindow
from topd.training.option_checks import check_options

MethodName = Literal["opd", "opd-capped", "topd"]


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass
class TOPDConfig(DistillationConfig):
    """Options of `TOPDTrainer`, on top of TRL's `DistillationConfig`. All of them: docs/options.md.

    Where the help says "our choice", the paper does not give the value; see docs/paper_to_code.md.

    Raises:
        ValueError: a value is out of range or not among those allowed, or two options exclude each other.
    """

    _VALID_DICT_FIELDS = [
        *DistillationConfig._VALID_DICT_FIELDS, "teachers", "teacher_server_kwargs", "teacher_chat_template_kwargs"
    ]  # fmt: skip

    method: MethodName = _option(
        "topd",
        "opd: on-policy distillation, as TRL's DistillationTrainer. opd-capped: false alarms suppressed "
        "(section 5.1). topd: near-future guidance (section 3).",
    )
    window_length: int = _option(50, "K, tokens per window. Paper: 50.")
    student_window: StudentWindow = _option(
        "rollout",
        "rollout: the rollout's own next K tokens, nothing to generate. candidate: the candidate token, then the "
        "student's greedy continuation. regenerated: the student continues the prefix, so the window may begin with "
        "another token. The paper's text allows all three; the default is our choice.",
    )

    window_memory: float = _option(
        4.0,
        "GiB for the keys and values of rollouts whose windows are decoded together; the other rollouts follow in "
        "further batches. Our choice.",
    )

    compact_sampling: bool = _option(
        False,
        "Remove finished rollouts from the batch while the others are sampled, which saves time if lengths differ; "
        "while sampling, adapters of a float32 student are merged, and on a CPU weights are packed for oneDNN. Same "
        "distribution, other random numbers than TRL. Not for vLLM. Our choice.",
    )
    candidate_ranking: Ranking = _option(
        "reverse_kl",
        "What makes a position high-loss: reverse_kl, the token loss; teacher_nll, the teacher's NLL of the sampled "
        "token (axis of Fig. 6); log_ratio, log p_S - log p_T of the sampled token (k1). The paper does not give it; "
        "our choice.",
    )
    candidate_share: float = _option(
        Method.candidate_share,
        "Share of a rollout's positions with the highest loss, at least one. The paper gives 218 of 9,688; the rule is "
        "our choice.",
    )
    opd_loss: Literal["auto", "trl", "one_pass"] = _option(
        "auto",
        "The loss of method=opd. trl: DistillationTrainer's own, bit for bit. one_pass: ours, the same to rounding, in "
        "less time and memory on CPU; the entropy it logs is estimated from the sampled tokens. auto: one_pass on a "
        "CPU, with several teachers or several updates per batch of rollouts, for text and beta 0 or 1; else trl.",
    )
    token_share: float = _option(
        1.0,
        "Control of method=opd: share of each rollout's response tokens whose losses are trained on, drawn at random "
        "for each batch of rollouts; at least one. The loss is their mean. 1: all tokens. Our choice.",
    )
    max_overhead: float | None = _option(
        None,
        "Maximum step-time overhead over plain OPD (0.10 = 10 %). The first ten steps measure the "
        "cost, three of them by plain OPD; then each rollout keeps as many of its highest-loss candidates as fit. "
        "None: no limit. Our choice.",
    )

    num_iterations: int = _option(
        1,
        "Passes over each batch of rollouts, as in GRPO. From the second on only the student's loss is computed, with "
        "its current weights: no sampling, no teacher, no windows. docs/cheaper_training.md.",
    )
    steps_per_generation: int | None = _option(
        None,
        "Micro-batches, per process, that are sampled together, as in GRPO; a multiple of gradient_accumulation_steps. "
        "None: gradient_accumulation_steps, so each batch of rollouts is one optimizer step.",
    )
    prefix_weight_max: float | None = _option(
        None,
        "With several updates per batch of rollouts: weight each token loss by how likely its prefix still is, min(exp("
        "mean of log p_now - log p_then over the prefix), this value) (REVO, 2609.37500: 4). None: weight 1.",
    )
    max_completion_length_start: int | None = _option(
        None,
        "Let the maximum length of rollouts grow linearly from this value to max_completion_length (progressive OPD, "
        "2605.31490). Needs max_completion_length_steps. None: the same length at every step.",
    )
    max_completion_length_steps: int | None = _option(
        None, "Optimizer steps after which rollouts may have max_completion_length tokens."
    )
    max_informative_tokens: int | None = _option(
        None,
        "End each rollout at its n-th informative position: one where fewer than 70 % of the 16 most likely tokens of "
        "student and teacher are the same (Flash-OPD, 2610.06105: 200; the 16 are our choice). None: no limit.",
    )

    teacher_model_server_url: str | None = _option(
        None,
        "URL of an OpenAI-compatible server (vLLM, SGLang) that continues the teacher's windows. Without a "
        "teacher_model the token losses come from it too, from its most likely tokens (vLLM).",
    )
    teacher_server_model: str | None = _option(
        None, "Name under which that server serves the teacher. None: the only model that it has."
    )
    teacher_server_key_env: str | None = _option(
        None, "Name of the environment variable that holds the server's API key. The key itself is never saved."
    )
    teacher_server_kwargs: dict[str, float] | str | None = _option(
        None,
        "Limits for requests to the server. timeout: maximum seconds per request, from connecting to the last byte "
        "(300). patience: give up after this many seconds of failed retries (600). concurrency: concurrent requests "
        "per process (16).",
    )
    loss_top_k: int = _option(
        20,
        "Without a teacher_model: number of most likely tokens per position whose log-probabilities are requested from "
        "the server (vLLM: at most its --max-logprobs). The paper uses the full vocabulary.",
    )

    teacher_system_prompt: str | None = _option(
        None,
        "System message of the teacher's prompt, instead of the student's; for prompts as messages. The student's "
        "prompt does not change. A column `teacher_prompt` gives the teacher a complete prompt of its own.",
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = _option(
        None, "Arguments of the chat template for the teacher's prompt, on top of chat_template_kwargs."
    )

    embedding: Embedding = _option(
        "student",
        "What the ground cost compares: student or teacher, static input embeddings; student_hidden or "
        "teacher_hidden, that model's last hidden states over the windows. The paper does not give it; our choice.",
    )
    ground_cost: GroundCost = _option(
        "cosine", "cosine: 1 - cosine; or sqeuclidean. The paper does not give it; our choice."
    )
    transport_solver: Solver = _option(
        "exact",
        "exact: one-hot targets, since the plan of two equally long windows is a permutation. entropic: soft targets "
        '(log-domain Sinkhorn), closer to the paper\'s words "soft target". The paper does not give it; our choice.',
    )
    entropic_epsilon: float = _option(
        0.05, "Regularisation of the entropic solver, in units of the window's mean ground cost. Our choice."
    )

    fork_rule: ForkRule = _option(
        "low_loss_quartile",
        "Which candidates are forks. low_loss_quartile: those whose D_OT is above the upper quartile of D_OT at "
        "low-loss positions (paper, section 2.1), estimated while training. batch_quantile: all but the bottom "
        "false_alarm_share of the batch's candidates. threshold: those above fork_threshold.",
    )
    recalibration_steps: int = _option(
        50,
        "With low_loss_quartile: the threshold is re-estimated every this many batches of rollouts (one per optimizer "
        "step by default), from up to 512 low-loss positions over at most 8 batches. Our choice.",
    )
    false_alarm_share: float = _option(
        0.30,
        "Share of the candidates, those with the lowest D_OT, that opd-capped caps (paper, section 5.1: 0.30) and that "
        "fork_rule=batch_quantile treats as false alarms.",
    )
    fork_threshold: float | None = _option(
        None,
        "D_OT above which candidates are forks, such as the threshold that topd probe reports; sets "
        "fork_rule=threshold.",
    )

    guidance_weight: float = _option(
        0.03,
        "lambda in L_OPD + lambda L_traj. The paper does not give it; our choice. What it means depends on "
        "guidance_reduction; guidance/grad_ratio logs how strong it is.",
    )
    guidance_target: TargetKind = _option(
        "transport", "transport: the paper. Controls: same_index (no alignment), own (the student's own tokens)."
    )
    guidance_at: Literal["forks", "false_alarms", "random"] = _option(
        "forks",
        "forks: the paper. Controls: false_alarms; random, candidates drawn at random instead of by loss.",
    )
    guidance_context: Literal["student", "teacher"] = _option(
        "student",
        "student: the student's own contexts (paper). Control: teacher, prefix + the teacher's window, with the "
        "reverse KL over the vocabulary in place of targets (another reading). Needs the teacher's weights.",
    )
    guidance_reduction: Literal["mean", "sum", "per_token"] = _option(
        "mean",
        "mean: mean over each fork's window, mean over forks; the gradient of the paper's sum over the window, whose "
        "targets sum to 1/K. sum: sum over each window, mean over forks (K times the paper's). per_token: sum over all "
        "windows, divided by the batch's response tokens.",
    )
    cap_false_alarms: bool = _option(False, "Also cap false alarms with method=topd. Paper (the formula): no.")
    cap_selection: Selection = _option(
        "low",
        "Which candidates opd-capped caps by D_OT: low (paper). Controls, of the same number: high, random.",
    )

    teachers: dict[str, str] | str | None = _option(
        None,
        "Several teachers instead of one (MOPD): {name: model}. The column `teacher` of each row names its teacher.",
    )

    eval_benchmark: str | None = _option(
        None,
        "Held-out problems that the student answers at each evaluation (eval_strategy, eval_steps), for eval_accuracy: "
        "the name of a benchmark or a file, as in topd eval.",
    )
    eval_benchmark_limit: int | None = _option(None, "Use only the first N problems of eval_benchmark.")
    eval_samples: int = _option(1, "Responses per problem of eval_benchmark.")
    eval_temperature: float = _option(
        0.0, "Sampling temperature for eval_benchmark. 0: greedy. Above 0: with top_p 0.95, as in topd eval."
    )

    audit_steps: int = _option(0, "Write an audit record to audit.jsonl every this many batches of rollouts. 0: never.")

    def __post_init__(self) -> None:
        check_kinds(self)
        super().__post_init__()
        if self.teacher_model_server_url is not None:
            self.teacher_model_server_url = without_secrets(self.teacher_model_server_url)
        if self.fork_threshold is not None:
            self.fork_rule = "threshold"
        check_options(self, TOPDConfig.__annotations__, choices())
        rename_dtype(self)

    @property
    def generation_steps(self) -> int:
        """Micro-batches, per process, that a batch of rollouts is split into."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps on each batch of rollouts."""
        return self.generation_steps // self.gradient_accumulation_steps * self.num_iterations

    def completion_limit(self, step: int) -> int | None:
        """Maximum tokens of a rollout that is sampled after `step` optimizer steps; None: no limit."""
        start, steps, longest = (
            self.max_completion_length_start, self.max_completion_length_steps, self.max_completion_length
        )  # fmt: skip
        if start is None or steps is None or longest is None or step >= steps:
            return longest
        return start + (longest - start) * step // steps

    @property
    def looks_ahead(self) -> bool:
        """Whether windows are needed; otherwise training is TRL's, untouched."""
        return self.method == "opd-capped" or (
            self.method == "topd" and (self.guidance_weight > 0 or self.cap_false_alarms)
        )

    @property
    def opd_in_one_pass(self) -> bool:
        """Whether plain OPD uses our loss instead of TRL's."""
        if self.opd_loss == "auto":
            on_cpu = self.use_cpu or not torch.accelerator.is_available()
            reads_once = bool(self.teachers) or self.updates_per_generation > 1
            return not self.looks_ahead and self.beta in (0.0, 1.0) and (on_cpu or reads_once)
        return self.opd_loss == "one_pass" and not self.looks_ahead

    @property
    def guides(self) -> bool:
        """Whether the trajectory loss is part of the loss."""
        return self.method == "topd" and self.guidance_weight > 0


def choices() -> dict[str, tuple[str, ...]]:
    """What each option of ours that has a fixed set of values allows."""
    hints = get_type_hints(TOPDConfig)
    return {name: get_args(hints[name]) for name in TOPDConfig.__annotations__ if get_origin(hints[name]) is Literal}
