"""Train an adapter of the pair on worked solutions: `python -m topd.lm.build teacher --out runs/lm`, resumable."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topd.lm.base import write_base
from topd.lm.task import draw, paraphrase


@dataclass(frozen=True)
class Recipe:
    """AdamW (betas 0.9, 0.98) on the solutions' tokens. Two stages, each a warm-up, a constant rate and a linear decay.

    Attributes:
        wide: solutions of the first stage, with numbers of any size.
        simple: solutions of the second stage, with numbers up to 100. Each solution is seen once.
        rank: of LoRA on all linear layers of the body.
    """

    wide: int
    simple: int
    rank: int = 16
    batch: int = 16
    learning_rate: float = 1e-3

    def share(self, step: int) -> float:
        """Share of the learning rate at a step: up in 20 steps, down in the last quarter of its stage."""
        first, second = self.wide // self.batch, self.simple // self.batch
        at, steps = (step, first) if step < first else (step - first, second)
        return min((at + 1) / 20, 4 * (steps - at) / steps, 1.0)


RECIPES = {"teacher": Recipe(wide=2816, simple=3840), "student": Recipe(wide=640, simple=640)}

RESERVED = {"teacher": 6400, "student": 1280}
"""Problems of each kind that the models may be trained on: none of them is in the data files."""
SIZES = {"prompts": 3000, "held_out": 500, "unseen": 500, "tuning": 300}


def write_data(folder: Path) -> None:
    """Prompts and problems as messages with answers. No problem is in two files or was trained on."""
    known = {
        p.question
        for name, count in RESERVED.items()
        for any_number in (True, False)
        for p in itertools.islice(draw(name, any_number), count)
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        chosen = list(itertools.islice((p for p in draw(split) if p.question not in known), size))
        known |= {p.question for p in chosen}
        rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in chosen]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(name: str, tokenizer: Any, recipe: Recipe) -> list[tuple[list[int], int]]:
    """Token ids of prompt + solution + end of turn, and the number of prompt tokens."""
    rng = random.Random(0)
    wide = list(itertools.islice(draw(name, any_number=True), recipe.wide))
    known = {problem.question for problem in wide}
    simple = itertools.islice((p for p in draw(name) if p.question not in known), recipe.simple)
    made = []
    for problem in [*wide, *simple]:
        solution = problem.solution if name == "teacher" else paraphrase(problem.solution, rng)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
        )
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        end = tokenizer(solution + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        made.append((start + end, len(start)))
    return made


def batches(data: list[tuple[list[int], int]], size: int) -> list[list[tuple[list[int], int]]]:
    """Batches of rows of like length, in random order."""
    rng = random.Random(1)
    made = []
    for at in range(0, len(data), 20 * size):
        pool = sorted(data[at : at + 20 * size], key=lambda row: len(row[0]))
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        made += groups
    return made


def backward(model: Any, batch: list[tuple[list[int], int]], pad: int, together: int = 4) -> float:
    """Gradients of the mean cross-entropy of the solutions' tokens (nats), `together` rows at a time; the loss."""
    count, total = sum(len(ids) - start for ids, start in batch), 0.0
    for at in range(0, len(batch), together):
        loss = loss_of(model, batch[at : at + together], pad) / count
        loss.backward()
        total += loss.item()
    return total


def loss_of(model: Any, batch: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Summed cross-entropy of the solutions' tokens; only they meet the head. Widths are multiples of 16."""
    longest = -(-max(len(ids) for ids, _ in batch) // 16) * 16
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
    learned = torch.tensor([[start <= i < len(ids) for i in range(1, longest)] for ids, start in batch])
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return nn.functional.cross_entropy(causal.lm_head(hidden[:, :-1][learned]), ids[:, 1:][learned], reduction="sum")


def train(name: str, out: Path) -> None:
    """Train `name` to the end of its recipe, from its last state if there is one."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, folder, base = RECIPES[name], out / name, out / "base"
    if not (base / "config.json").is_file():
        write_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    state_file = folder / "training.pt"
    if state_file.is_file():
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    else:
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=layers, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    step, seconds = 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        step, seconds = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
    steps = (recipe.wide + recipe.simple) // recipe.batch
    made = rows(name, tokenizer, recipe)
    data = [*batches(made[: recipe.wide], recipe.batch), *batches(made[recipe.wide :], recipe.batch)]
    model.train()
    while step < steps:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.share(step)
        loss = backward(model, data[step], tokenizer.pad_token_id)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seconds = step + 1, seconds + time.perf_counter() - started
        record = {"step": step, "loss": round(loss, 4), "seconds": round(seconds)}
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
        if step % 20 == 0 or step == steps:
            model.save_pretrained(str(folder))
            torch.save({"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}, state_file)
            print(f"{name}: step {step} of {steps}, loss {loss:.3f}, {seconds / step:.1f} s per step", flush=True)
    (folder / "record.json").write_text(json.dumps({"recipe": asdict(recipe), "seconds": round(seconds)}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*RECIPES, "data"])
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    given = parser.parse_args()
    write_data(given.out) if given.name == "data" else train(given.name, given.out)
