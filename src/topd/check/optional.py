"""Checks of what only some runs use: libraries, adapters, evaluation, the Hub, the teacher's prompt and server."""

import importlib.util
from typing import Any

import torch
from huggingface_hub import constants, get_token
from transformers import AutoModelForCausalLM
from transformers.integrations import get_available_reporting_integrations

from topd.check.findings import Finding, fails, failure, ok, warns
from topd.check.prompts import shown
from topd.check.setup import Setup
from topd.evaluation.benchmarks import question
from topd.evaluation.while_training import HeldOut, check_best_metric, problems_of
from topd.loading.adapters import base_of, is_adapter
from topd.loading.shared_base import ONE_MODEL, TWO_ADAPTERS
from topd.loading.teacher_prompts import SAME_PROMPT, SELF, check_options
from topd.teachers.from_options import check_without_weights, teacher_server
from topd.teachers.server_windows import connect

OPTIMIZERS = {
    "8bit": "bitsandbytes", "4bit": "bitsandbytes", "paged": "bitsandbytes", "bnb": "bitsandbytes",
    "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "schedule_free": "schedulefree",
    "torchao": "torchao", "grokadamw": "grokadamw", "stable_adamw": "optimi",
}  # fmt: skip
"""The package that an optimizer needs, by a part of the optimizer's name."""


def one_model(setup: Setup) -> Finding | None:
    """Whether student and teacher are the same weights."""
    ours, theirs = setup.pair
    revisions = {(setup.model and setup.model.model_revision) or "main", setup.config.teacher_model_revision or "main"}
    if setup.config.teacher_model_name_or_path == SELF:
        start = "the student's base, without the adapter" if setup.adapters else "the student as it is before training"
        return ok(f"the teacher is {start}, with its own prompt")
    new_adapter = setup.adapters and not is_adapter(ours.folder)
    if ours.folder != theirs.folder or len(revisions) > 1 or new_adapter or not setup.teacher_here:
        return None
    return failure(ONE_MODEL.format(what=f"model, {ours.name}"))


def teacher_prompt(setup: Setup) -> Finding | None:
    """The first of the teacher's own prompts. An error where one is empty, or where `self` has none.

    Raises `TOPDError` if options do not fit, a row has no prompt for the teacher, or the chat template fails.
    """
    itself = setup.config.teacher_model_name_or_path == SELF
    if not setup.prompted:
        return failure(SAME_PROMPT) if itself else None
    check_options(setup.config)
    lengths = [len(ids) for ids in setup.teacher_sample.values()]
    if not min(lengths):
        return fails(f"{lengths.count(0):,} of {len(lengths):,} have no tokens", "Fix these rows.")
    first = str(setup.student.tokenizer.decode(next(iter(setup.teacher_sample.values()))))
    same = sum(ids == setup.teacher_sample[row] for row, ids in setup.sample.items())
    found = f"{min(lengths)} to {max(lengths)} tokens; the first reads {shown(first)}"
    if same:
        report = fails if itself and same == len(setup.sample) else warns
        return report(
            f"{same:,} of {len(setup.sample):,} are those of the student; {found}",
            "Both models then read the same: check the column teacher_prompt, or the options that change it.",
        )
    return ok(found)


def libraries(setup: Setup) -> Finding | None:
    """Whether the packages that the options need are installed: vLLM, FlashAttention, bitsandbytes, trackers, ..."""
    needed = packages(setup)
    missing = {package: option for package, option in needed.items() if importlib.util.find_spec(package) is None}
    trackers = [name for name in setup.config.report_to or [] if name not in get_available_reporting_integrations()]
    found = [f"{package} ({option})" for package, option in missing.items()] + [f"{t} (report_to)" for t in trackers]
    if found:
        return fails(
            f"not installed: {', '.join(found)}",
            f"pip install {' '.join([*(package.replace('_', '-') for package in missing), *trackers])}, or leave these "
            "options out.",
        )
    return ok(f"installed: {', '.join(needed)}") if needed else None


def packages(setup: Setup) -> dict[str, str]:
    """Needed packages, and the option that needs each."""
    config, model = setup.config, setup.model
    needed: dict[str, str] = {}
    if config.use_vllm:
        needed["vllm"] = "use_vllm"
    kwargs: list[Any] = [config.model_init_kwargs or {}, config.teacher_model_init_kwargs or {}]
    attention = [getattr(model, "attn_implementation", None), *(each.get("attn_implementation") for each in kwargs)]
    for name in map(str, attention):
        if name.startswith("flash_attention"):
            needed["flash_attn_interface" if name.endswith("3") else "flash_attn"] = f"attn_implementation={name}"
        elif "/" in name:
            needed["kernels"] = f"attn_implementation={name}"
    optimizer = str(getattr(config.optim, "value", config.optim))
    needed |= {package: f"optim={optimizer}" for part, package in OPTIMIZERS.items() if part in optimizer}
    options = {
        "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "use_liger_kernel": "liger_kernel",
        "deepspeed": "deepspeed", "use_peft": "peft",
    }  # fmt: skip
    for option, package in options.items():
        if getattr(config, option, None) or getattr(model, option, None):
            needed[package] = option
    return needed


def sampling(setup: Setup) -> Finding | None:
    """Whether rollouts can be sampled."""
    config = setup.config
    top_p, length = config.top_p, config.max_completion_length
    if 0 < top_p <= 1 and (length or 0) >= 1:
        return None
    return fails(
        f"top_p is {top_p}, max_completion_length {length}: nothing can be sampled",
        "--top_p in (0, 1], --max_completion_length at least 1.",
    )


def evaluation(setup: Setup) -> Finding | None:
    """Whether there is data for the evaluation loss, and an evaluation to use it."""
    strategy = str(getattr(setup.config.eval_strategy, "value", setup.config.eval_strategy))
    if setup.evaluation is None:
        if strategy == "no" or setup.config.eval_benchmark is not None:
            return None
        return fails(
            f"eval_strategy is {strategy}, and there are no prompts for it",
            "--eval_data FILE.jsonl, or leave --eval_strategy out.",
        )
    if strategy == "no":
        return warns(
            "eval_data is given, but eval_strategy is no",
            "--eval_strategy steps --eval_steps 100, or leave --eval_data out.",
        )
    return ok(f"{setup.evaluation:,} prompts, eval_strategy {strategy}")


def benchmark(setup: Setup) -> Finding | None:
    """Whether the held-out problems are not trained on. Raises `TOPDError` if they cannot be read and answered."""
    config = setup.config
    problem_set = problems_of(config)
    if problem_set is None:
        return None
    check_best_metric(config, setup.evaluation)
    held_out = HeldOut.of(problem_set, config, setup.student.tokenizer, setup.student.config)
    trained_on = set(map(question, setup.prompts))
    seen = sum(question(problem.prompt) in trained_on for problem in problem_set.problems)
    how = "greedy" if config.eval_temperature == 0 else f"temperature {config.eval_temperature}"
    found = (
        f"{problem_set.name}: {len(held_out):,} problems x {config.eval_samples}, {how}, up to "
        f"{held_out.sampling.max_new_tokens:,} tokens, {config.eval_batch_size} at once"
    )
    if seen:
        return warns(
            f"{seen:,} of the problems are among the training prompts; {found}",
            "Remove them from --data: accuracy on them says nothing about other problems.",
        )
    return ok(found)


def adapters(setup: Setup) -> Finding | None:
    """Whether the adapter's targets are modules of the student, tested on a model without storage."""
    if not setup.adapters or importlib.util.find_spec("peft") is None:
        return None
    if is_adapter(setup.student.folder):
        if setup.model.use_peft:
            return failure(TWO_ADAPTERS.format(student=setup.student.folder))
        return ok(f"the one in {setup.student.name}, on {base_of(setup.student.folder)}, is trained further")
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from trl import get_peft_config

    config: Any = get_peft_config(setup.model)
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(setup.student.config, trust_remote_code=False)
        try:
            adapted: Any = get_peft_model(student, config)
        except (ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            return fails(reason, "--lora_target_modules: names of the student's linear layers.")
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        return fails(
            "the output head is among the targets; its adapter would not be trained",
            "Leave lm_head out of --lora_target_modules.",
        )
    trained, whole = adapted.get_nb_trainable_parameters()
    count = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    return ok(f"on {count} layers, {trained:,} of {whole:,} parameters are trained")


def hub(setup: Setup) -> Finding | None:
    """Whether the model can be pushed. Sends no request to the Hub."""
    if not setup.config.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        return fails("push_to_hub with HF_HUB_OFFLINE set", "Unset it, or leave --push_to_hub out.")
    if not (setup.config.hub_token or get_token()):
        return fails("push_to_hub without a token", "Log in (hf auth login), or set HF_TOKEN.")
    return ok(f"pushed to {setup.config.hub_model_id or 'a repository named like the output folder'}")


def server(setup: Setup) -> Finding | None:
    """Raises `TOPDError` unless the server serves the teacher, tokenizes as the student does, and returns token ids."""
    if setup.config.teacher_model_server_url is None:
        return None
    if not setup.teacher_here:
        check_without_weights(setup.config)
    found = teacher_server(setup.config, setup.teacher_here, patience=10.0)  # seconds; training waits longer
    if found is None:
        return ok(f"method={setup.config.method} does not use it")
    rows = setup.student.text_config.vocab_size
    served_as = setup.config.teacher_server_model
    windows = connect(found, setup.student.tokenizer, setup.student.end_tokens, served_as, vocabulary=rows)
    context = f"a context of {windows.context:,}" if windows.context else "an unknown context"
    return ok(f"{found.url} serves {windows.model!r} with {context}, token ids in and out")
