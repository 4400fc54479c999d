"""`topd demo build`: train the embedded teacher and students from nothing, on worked solutions, with fixed seeds.

Three students share one lineage: the easy one is trained from scratch, the standard one continues from it on data with
a stronger left-to-right habit, and the hard one from the standard one. The wording one continues from the easy one
with a weaker habit. The stubborn one is trained from scratch on the habit, so that it has hardly ever seen the other
way: the trap of the paper, where one mended token is not enough. Each model is written with a `build.json` that says
how it was made and how well it answers held-out problems.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from topd.demo.accuracy import greedy_accuracy
from topd.demo.pair import pair_folder
from topd.demo.task import STUDENTS, TEACHER, Style, make_problems, sample_problem, write_solution
from topd.demo.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How one model of the pair is trained: AdamW (betas 0.9, 0.98), one-cycle cosine, cross-entropy on solutions."""

    steps: int
    learning_rate: float
    batch: int = 96
    seed: int = 0
    after: str = ""
    """The student that it continues from; empty: from scratch."""


TEACHER_RECIPE = Recipe(steps=2400, learning_rate=2e-3, seed=1)
STUDENT_RECIPES = {
    "easy": Recipe(steps=2000, learning_rate=2e-3, seed=2),
    "standard": Recipe(steps=400, learning_rate=5e-4, seed=3, after="easy"),
    "hard": Recipe(steps=400, learning_rate=5e-4, seed=4, after="standard"),
    "wording": Recipe(steps=400, learning_rate=5e-4, seed=5, after="easy"),
    "stubborn": Recipe(steps=2000, learning_rate=2e-3, seed=6),
}


def new_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Qwen3ForCausalLM:
    """A random Qwen3 with tied embeddings and heads of 32."""
    heads = width // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def solution_batch(
    tokenizer: PreTrainedTokenizerFast, style: Style, rng: random.Random, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [size, length] of prompt + solution + EOS, right-padded, and labels with the prompt masked (-100)."""
    rows: list[torch.Tensor] = []
    starts: list[int] = []
    while len(rows) < size:
        problem = sample_problem(rng)
        if problem.held_out:
            continue
        prompt = tokenizer(problem.prompt)["input_ids"]
        solution = tokenizer(write_solution(problem, style, rng))["input_ids"]
        starts.append(len(prompt))
        rows.append(torch.tensor([*prompt, *solution, tokenizer.eos_token_id]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    position = torch.arange(ids.shape[1])
    labels = ids.clone()
    for row, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        labels[row, (position < start) | (position >= len(tokens))] = -100
    return ids, labels


def train_on_solutions(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, style: Style, recipe: Recipe, log_every: int = 100
) -> float:
    """Train in place; return the last loss (nats a token)."""
    rng = random.Random(f"topd-build-{recipe.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )
    model.train()
    started, loss = time.perf_counter(), torch.tensor(0.0)
    for step in range(1, recipe.steps + 1):
        ids, labels = solution_batch(tokenizer, style, rng, recipe.batch)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % log_every == 0:
            seconds = (time.perf_counter() - started) / step
            left = seconds * (recipe.steps - step) / 60
            print(f"step {step}/{recipe.steps}  loss {loss.item():.4f}  {left:.1f} min left", flush=True)
    return loss.item()


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, style: Style, recipe: Recipe, loss: float, folder: Path
) -> None:
    """Write weights (safetensors), tokenizer and `build.json`."""
    accuracy = greedy_accuracy(model, tokenizer, make_problems(1000, seed=0, held_out=True))
    print(f"{folder.name}: greedy accuracy {accuracy:.3f} on 1000 held-out problems", flush=True)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "parameters": model.num_parameters(),
        "recipe": asdict(recipe),
        "style": asdict(style),
        "last_loss_nats": round(loss, 4),
        "greedy_accuracy_held_out_1000": accuracy,
        "torch": torch.__version__,
    }
    (folder / "build.json").write_text(json.dumps(record, indent=1) + "\n")


def build(out: Path, only: str | None = None) -> None:
    """Train the teacher and the students into `out/teacher` and `out/student-*` (about 90 minutes on one core).

    `only`: "teacher", or the name of a student; what it continues from is then taken from `out` or the package.
    """
    tokenizer = build_tokenizer()
    if only in (None, "teacher"):
        torch.manual_seed(TEACHER_RECIPE.seed)
        teacher = new_model(tokenizer, width=160, layers=4)
        loss = train_on_solutions(teacher, tokenizer, TEACHER, TEACHER_RECIPE)
        save(teacher, tokenizer, TEACHER, TEACHER_RECIPE, loss, out / "teacher")
    for name, recipe in STUDENT_RECIPES.items():
        if only not in (None, name):
            continue
        torch.manual_seed(recipe.seed)
        student = new_model(tokenizer, width=128, layers=3)
        if recipe.after:
            made = out / f"student-{recipe.after}"
            start = made if made.is_dir() else pair_folder(made.name)
            student = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        loss = train_on_solutions(student, tokenizer, STUDENTS[name], recipe)
        save(student, tokenizer, STUDENTS[name], recipe, loss, out / f"student-{name}")
