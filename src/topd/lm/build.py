"""Train an adapter of the pair on worked solutions: `python -m topd.lm.build teacher --out runs/lm-pair`, resumable.

`lm:warm-student` is trained by `topd warmstart --config recipe:lm-warmstart`; here its adapter is only made small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from topd.lm.pair import model_folder
from topd.lm.task import SHARES, Problem, draw, equation, paraphrase, stepwise


@dataclass(frozen=True)
class Stage:
    """Rows that are trained on in order, each once."""

    # solutions with numbers of any size (wide), up to 100 (simple), up to 100 and with long sums in steps (stepwise),
    # or equations alone (drill)
    kind: Literal["wide", "simple", "stepwise", "drill"]
    rows: int  # for a warm-up, a constant rate, and a linear decay over the last quarter
    steps: int | None = None  # after which it ends; None: all
    shares: tuple[int, ...] = SHARES  # of the kinds of equations


@dataclass(frozen=True)
class Recipe:
    """AdamW (betas 0.9, 0.98); `rank` is of LoRA on all linear layers of the body."""

    stages: tuple[Stage, ...]
    rank: int = 16
    batch: int = 16
    learning_rate: float = 1e-3

    def rates(self) -> list[float]:
        """The learning rate at each step."""
        found = []
        for stage in self.stages:
            steps = stage.rows // self.batch
            share = [min((at + 1) / 20, 4 * (steps - at) / steps, 1.0) for at in range(steps)]
            found += share[: stage.steps]
        return [self.learning_rate * each for each in found]


RECIPES = {
    "teacher": Recipe(
        (
            Stage("wide", 2816), Stage("simple", 3840, steps=84), Stage("drill", 640), Stage("simple", 768),
            Stage("drill", 384, shares=(10, 60, 15, 15, 0)), Stage("stepwise", 640),
        )
    ),
    "student": Recipe(
        (
            Stage("wide", 640), Stage("simple", 640), Stage("simple", 640, steps=20), Stage("drill", 480),
            Stage("simple", 320),
        )
    ),
}  # fmt: skip

RESERVED = {"teacher": 6400, "student": 3200}
"""Problems of each kind that the models may be trained on: none of them is in the data files."""
SIZES = {"prompts": 3000, "held_out": 500, "unseen": 500, "tuning": 300}


def write_data(folder: Path) -> None:
    """Prompts and problems as messages with answers. No problem is in two files or was trained on."""
    known: set[str] = set()
    for (name, count), any_number in itertools.product(RESERVED.items(), (True, False)):
        known |= {problem.question for problem in itertools.islice(draw(name, any_number), count)}
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        chosen = list(itertools.islice((p for p in draw(split) if p.question not in known), size))
        known |= {p.question for p in chosen}
        rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in chosen]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are learned."""


def rows(name: str, tokenizer: Any, recipe: Recipe) -> Iterator[list[Row]]:
    """The rows of each stage."""
    rng, drills = random.Random(0), random.Random(2)
    simple = draw(name)
    sources = {"wide": draw(name, any_number=True), "simple": simple, "stepwise": simple}
    known: set[str] = set()
    for stage in recipe.stages:
        if stage.kind == "drill":
            yield [drilled(tokenizer, drills, stage.shares) for _ in range(stage.rows)]
            continue
        chosen = list(itertools.islice((p for p in sources[stage.kind] if p.question not in known), stage.rows))
        known |= {problem.question for problem in chosen}
        if stage.kind == "stepwise":
            chosen = [replace(problem, solution=stepwise(problem.solution)) for problem in chosen]
        yield [solved(problem, name, tokenizer, rng) for problem in chosen]


def solved(problem: Problem, name: str, tokenizer: Any, rng: random.Random) -> Row:
    """A prompt with its solution and the end of turn, which are learned."""
    solution = problem.solution if name == "teacher" else paraphrase(problem.solution, rng)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
    )
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = tokenizer(solution + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return start + end, [False] * len(start) + [True] * len(end)


def drilled(tokenizer: Any, rng: random.Random, shares: tuple[int, ...], equations: int = 16) -> Row:
    """Equations, of which the results are learned: the base model gets most sums of two-digit numbers wrong."""
    ids: list[int] = []
    learned: list[bool] = []
    for _ in range(equations):
        for text, result in zip(equation(rng, shares), (False, True), strict=True):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, learned = ids + tokens, learned + [result] * len(tokens)
    return ids, learned


def batches(data: list[Row], size: int) -> list[list[Row]]:
    """Batches of rows of like length, in random order."""
    rng = random.Random(1)
    made = []
    for at in range(0, len(data), 20 * size):
        pool = sorted(data[at : at + 20 * size], key=lambda row: len(row[0]))
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        made += groups
    return made


TOGETHER = 4
"""Rows of a forward pass."""


def backward(model: Any, batch: list[Row], pad: int) -> float:
    """Gradients of the mean cross-entropy of the learned tokens (nats), `TOGETHER` rows at a time; the loss.

    Only learned tokens meet the head. Widths are multiples of 16.
    """
    count, total = sum(sum(learned) for _, learned in batch), 0.0
    causal = model.get_base_model()
    for at in range(0, len(batch), TOGETHER):
        part = batch[at : at + TOGETHER]
        longest = -(-max(len(ids) for ids, _ in part) // 16) * 16
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in part])
        learned = torch.tensor([learned[1:] + [False] * (longest - len(learned)) for _, learned in part])
        hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = causal.lm_head(hidden[:, :-1][learned])
        loss = nn.functional.cross_entropy(logits, ids[:, 1:][learned], reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def train(name: str, out: Path) -> None:
    """Train `name` to the end of its recipe, from its last state if there is one."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, folder, base = RECIPES[name], out / name, model_folder("base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    state_file, step, seconds = folder / "training.pt", 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        step, seconds = state["step"], state["seconds"]
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    log_file = folder / "log.jsonl"
    if log_file.is_file():  # without the steps behind the saved state, which are done again
        log_file.write_text("".join(log_file.read_text().splitlines(keepends=True)[:step]))
    rates, data = recipe.rates(), list[list[Row]]()
    for stage, made in zip(recipe.stages, rows(name, tokenizer, recipe), strict=True):
        data += batches(made, recipe.batch)[: stage.steps]
    model.train()
    while step < len(rates):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        loss = backward(model, data[step], tokenizer.pad_token_id)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seconds = step + 1, seconds + time.perf_counter() - started
        record = {"step": step, "loss": round(loss, 4), "seconds": round(seconds)}
        folder.mkdir(parents=True, exist_ok=True)
        with open(log_file, "a") as log:
            log.write(json.dumps(record) + "\n")
        if step % 20 == 0 or step == len(rates):
            parts = {"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
            unfinished = state_file.with_suffix(".unfinished")
            torch.save({"step": step, "seconds": seconds, **parts}, unfinished)
            unfinished.replace(state_file)
            print(f"{name}: step {step} of {len(rates)}, loss {loss:.3f}, {seconds / step:.1f} s per step", flush=True)
    model.save_pretrained(str(folder))
    (folder / "record.json").write_text(json.dumps({"recipe": asdict(recipe), "seconds": round(seconds)}, indent=1))
    ship(folder, folder / "shipped", "lm:base")


def ship(adapter: Path, out: Path, base: str) -> None:
    """Write an adapter of `base` in bfloat16: what `src/topd/lm/adapters` holds."""
    from safetensors.torch import load_file, save_file

    out.mkdir(exist_ok=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: each.bfloat16() for name, each in weights.items()}, out / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*RECIPES, "data", "warm-student"])
    parser.add_argument("--out", type=Path, default=Path("runs/lm-pair"))
    given = parser.parse_args()
    if given.name == "data":
        write_data(given.out)
    elif given.name == "warm-student":
        ship(given.out / "adapter", given.out / "shipped", "lm:student")
    else:
        train(given.name, given.out)
