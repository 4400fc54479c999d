"""Make a level's pair and data: train teacher and student from nothing, write prompts and problems for `topd study`."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ladder.levels import Level, Recipe
from ladder.tasks import STUDENT, TEACHER, Problem, Style, draw, problems, write_solution
from topd.evaluation.answers import verdict
from topd.evaluation.engines import LocalEngine, Request, Sampling

PAD, EOS = "<pad>", "<eos>"
SEEDS = {"training": 1, "prompts": 2, "held_out": 3, "tuning": 4}
STYLES = {"teacher": TEACHER, "student": STUDENT}


def write_data(level: Level, out: Path) -> None:
    """`prompts.jsonl` to train on, `held_out.jsonl` and `tuning.jsonl` with answers; no problem is in two of them."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = draw(level.tasks, level.held_out, SEEDS["held_out"], held_out=True)
    asked = {problem.prompt for problem in held_out}
    others = draw(level.tasks, level.held_out + level.tuning, SEEDS["tuning"], held_out=True)
    files = {
        "prompts": draw(level.tasks, level.prompts, SEEDS["prompts"], held_out=False),
        "held_out": held_out,
        "tuning": [problem for problem in others if problem.prompt not in asked][: level.tuning],
    }
    for name, drawn in files.items():
        lines = [json.dumps({"prompt": each.prompt, "answer": each.answer, "task": each.task}) for each in drawn]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def build_tokenizer(level: Level) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the level's own text; a digit is a token."""
    rng = random.Random(0)
    drawn = draw(level.tasks, 3000, SEEDS["training"], held_out=False)
    text = [each.prompt + write_solution(each, style, rng) for each in drawn for style in STYLES.values()]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=1024
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen3ForCausalLM:
    """A random Qwen3 of the recipe's size."""
    head = 64 if recipe.width >= 256 else 32
    heads = recipe.width // head
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head,
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def rows(
    tokenizer: PreTrainedTokenizerFast, learned: Sequence[Problem], style: Style, seed: int
) -> list[dict[str, list[int]]]:
    """Token ids of prompt + solution + EOS, with labels on the solution and EOS."""
    rng = random.Random(seed)
    prompts = tokenizer([each.prompt for each in learned])["input_ids"]
    solutions = tokenizer([write_solution(each, style, rng) + EOS for each in learned])["input_ids"]
    return [
        {"input_ids": prompt + solution, "labels": [-100] * len(prompt) + solution}
        for prompt, solution in zip(prompts, solutions, strict=True)
    ]


class TimeLeft(TrainerCallback):
    """A line now and then."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            a_step = (time.perf_counter() - self.started) / state.global_step
            left = a_step * (state.max_steps - state.global_step) / 60
            at = f"step {state.global_step}/{state.max_steps}"
            print(f"{at}  loss {float(logs['loss']):.4f}  {left:.1f} min left", flush=True)


def train(name: str, level: Level, tokenizer: PreTrainedTokenizerFast, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train the level's teacher or student, save it in `out/name`, return what `build.json` says of it.

    Args:
        name: "teacher" or "student".
    """
    recipe: Recipe = getattr(level, name)
    set_seed(seed)
    model = new_model(tokenizer, recipe)
    started = time.perf_counter()
    endless = (each for each in problems(level.tasks, SEEDS["training"]) if not each.held_out)
    data: Any = rows(tokenizer, list(islice(endless, recipe.problems)), STYLES[name], seed)
    print(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {len(data)} solutions of "
          f"{sum(len(row['input_ids']) for row in data) / len(data):.0f} tokens", flush=True)  # fmt: skip
    args = TrainingArguments(
        str(out / f"{name}-training"), per_device_train_batch_size=recipe.batch, num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate, adam_beta2=0.98, weight_decay=0.01, lr_scheduler_type="cosine",
        warmup_steps=100, max_grad_norm=1.0, logging_steps=100, save_strategy="no", report_to=[], disable_tqdm=True,
        train_sampling_strategy="group_by_length", remove_unused_columns=False, seed=seed,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer, padding=True), data)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TimeLeft())
    trainer.train()
    model.generation_config.do_sample = False
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    training = time.perf_counter() - started
    right = accuracy(model, tokenizer, draw(level.tasks, min(600, level.tuning), SEEDS["tuning"], held_out=True))
    print(f"{name}: " + ", ".join(f"{task} {share:.1%}" for task, share in right.items()), flush=True)
    return {
        "parameters": model.num_parameters(), "recipe": asdict(recipe), "style": asdict(STYLES[name]),
        "accuracy": right, "seconds_training": round(training), "torch": torch.__version__,
    }  # fmt: skip


def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Problem]) -> dict[str, float]:
    """Share of right greedy answers, by task and over all."""
    model.eval()
    requests = [Request(place, each.prompt) for place, each in enumerate(asked)]
    sampling = Sampling(temperature=0.0, max_new_tokens=400)
    right: Counter[str] = Counter()
    for batch in LocalEngine(model, tokenizer, together=128).respond(requests, sampling):
        for place, response in batch:
            right[asked[place].task] += verdict(response.text, asked[place].answer, "integer").right
    counts = Counter(each.task for each in asked)
    return {task: right[task] / counts[task] for task in sorted(counts)} | {"all": right.total() / len(asked)}
