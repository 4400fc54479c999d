"""`topd demo build`: train the embedded models from scratch, on worked solutions, with fixed seeds.

The demo and the study use the long pair (`long-teacher`, `long-student`). It continues from short models: the teacher,
and the easy student, from which the standard student continues too, with a stronger left-to-right habit. Each model has
a `build.json` with its recipe and its accuracy on held-out problems.
"""

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from topd.embedded import task
from topd.embedded.pair import pair_folder
from topd.embedded.tokenizer import MAX_LENGTH, build_tokenizer
from topd.evaluation.embedded import greedy_accuracy
from topd.runs.files import write_json


@dataclass(frozen=True)
class Recipe:
    """How an embedded model is trained: AdamW (betas 0.9, 0.98), one-cycle cosine, cross-entropy on solutions."""

    style: task.Style  # of the solutions
    steps: int
    learning_rate: float
    seed: int
    width: int = 128
    layers: int = 3
    batch: int = 96
    after: str = ""  # the embedded model to continue from; empty: from scratch
    level: task.Level = "short"  # of the problems


RECIPES = {
    "teacher": Recipe(task.TEACHER, 2400, 2e-3, seed=1, width=160, layers=4),
    "student-easy": Recipe(task.STUDENTS["easy"], 2000, 2e-3, seed=2),
    "student-standard": Recipe(task.STUDENTS["standard"], 400, 5e-4, seed=3, after="student-easy"),
    "long-teacher": Recipe(task.TEACHER, 900, 1e-3, seed=7, batch=32, after="teacher", level="long"),
    "long-student": Recipe(task.LONG_STUDENT, 600, 1e-3, seed=8, batch=32, after="student-easy", level="long"),
}
"""Recipes by folder name, in order: a model follows the one that it continues from."""


def new_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Qwen3ForCausalLM:
    """A random Qwen3 with tied embeddings and heads of 32."""
    heads = width // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH["short"], pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def solution_batch(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [batch, length] of prompt + solution + EOS, right-padded, and labels with the prompt masked (-100)."""
    rows: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    while len(rows) < recipe.batch:
        problem = task.sample_problem(rng, recipe.level)
        if problem.held_out:
            continue
        prompt = tokenizer(problem.prompt)["input_ids"]
        solution = tokenizer(task.write_solution(problem, recipe.style, rng))["input_ids"]
        rows.append(torch.tensor([*prompt, *solution, tokenizer.eos_token_id]))
        labels.append(torch.tensor([*[-100] * len(prompt), *solution, tokenizer.eos_token_id]))
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad_sequence(labels, batch_first=True, padding_value=-100)


def train_on_solutions(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> float:
    """Train in place; return the last loss (nats/token)."""
    rng = random.Random(f"topd-build-{recipe.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )
    model.train()
    started, loss = time.perf_counter(), torch.tensor(0.0)
    for step in range(1, recipe.steps + 1):
        ids, labels = solution_batch(tokenizer, recipe, rng)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = (time.perf_counter() - started) / step
            left = seconds * (recipe.steps - step) / 60
            print(f"step {step}/{recipe.steps}  loss {loss.item():.4f}  {left:.1f} min left", flush=True)
    return loss.item()


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, loss: float, folder: Path
) -> None:
    """Write weights (safetensors), tokenizer and `build.json`."""
    problems = task.make_problems(1000, seed=0, held_out=True, level=recipe.level)
    accuracy = greedy_accuracy(model, tokenizer, problems)
    print(f"{folder.name}: greedy accuracy {accuracy:.3f} on 1000 held-out problems", flush=True)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "parameters": model.num_parameters(),
        "recipe": asdict(recipe),
        "last_loss_nats": round(loss, 4),
        "greedy_accuracy_held_out_1000": accuracy,
        "torch": torch.__version__,
    }
    write_json(record, folder / "build.json")


def starting_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path) -> Qwen3ForCausalLM:
    """The model to train: a random one, or an earlier one from `out` or the package, adapted to the level."""
    torch.manual_seed(recipe.seed)
    if not recipe.after:
        return new_model(tokenizer, recipe.width, recipe.layers)
    made = out / recipe.after
    folder = made if made.is_dir() else pair_folder(recipe.after)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = MAX_LENGTH[recipe.level]
    return model


def build(out: Path, only: str | None = None) -> None:
    """Train the embedded models into folders of `out` (about two hours on one core).

    `only`: build only this model; the one that it continues from is taken from `out` or the package.
    """
    for name, recipe in RECIPES.items():
        if only not in (None, name):
            continue
        tokenizer = build_tokenizer(recipe.level)
        model = starting_model(tokenizer, recipe, out)
        loss = train_on_solutions(model, tokenizer, recipe)
        save(model, tokenizer, recipe, loss, out / name)
