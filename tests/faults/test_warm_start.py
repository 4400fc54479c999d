"""The warm start survives too: it stands on the same trainer."""

import shutil

import pytest
import torch
from datasets import Dataset
from tiny import TOKENIZER, tiny_model

from topd.warmstart import WarmStartConfig, WarmStartTrainer


def warm_start(out, seed=0):
    args = WarmStartConfig(
        str(out), per_device_train_batch_size=4, max_steps=5, save_strategy="steps", save_steps=1, learning_rate=1e-3,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    rows = [
        {"prompt": f"what is {a}+{b}?", "completion": f" first {a}+{b}={a + b}"} for a in (1, 2, 3) for b in (2, 3, 4)
    ]
    return WarmStartTrainer(
        model=tiny_model(seed), teacher_model=tiny_model(1, width=96), args=args, processing_class=TOKENIZER,
        train_dataset=Dataset.from_list(rows[:8]),
    )  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_in_any_epoch_equals_uninterrupted(tmp_path, step, fault):
    through = warm_start(tmp_path / "through")
    through.train()
    for checkpoint in range(1, step + 1):
        shutil.copytree(
            tmp_path / "through" / f"checkpoint-{checkpoint}", tmp_path / "run" / f"checkpoint-{checkpoint}"
        )
    resumed = warm_start(tmp_path / "run", seed=7)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    fault(f"warm start, resumed after step {step} (two steps an epoch)", "equal to the uninterrupted run, bit for bit")
