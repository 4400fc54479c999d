"""Low-precision weights and small learning rates: how many weights move, and that it is said once."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import TOKENIZER, tiny_trainer
from transformers import AutoModelForCausalLM

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.loading.precision import RoundingWarning, watch_rounding
from topd.warmstart import WarmStartConfig, WarmStartTrainer

LOST = "is lost in rounding"
OURS = [
    {"method": "topd"},
    {"method": "topd", "student_window": "rollout", "gradient_checkpointing": True},
    {"method": "opd", "opd_loss": "one_pass"},
    {"trainer_options": {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}},
]


def embedded(role, dtype):
    return AutoModelForCausalLM.from_pretrained(pair_folder(role), dtype=dtype)


def moved(tmp_path, dtype):
    """The share of the embedded student's weights that ten steps of AdamW at the paper's learning rate move."""
    model = embedded("student-standard", dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = tiny_trainer(
        tmp_path, student=model, teacher=embedded("teacher", dtype), max_steps=10, learning_rate=2e-6,
        lr_scheduler_type="constant", max_completion_length=12, method="opd",
    )  # fmt: skip
    trainer.train()
    changed = [(old != new).sum() for old, new in zip(before, model.parameters(), strict=True)]
    return float(sum(changed)) / sum(parameter.numel() for parameter in before)


def test_bfloat16_weights_hardly_move_and_that_is_said_once(tmp_path, caplog, capsys):
    share = moved(tmp_path, torch.bfloat16)
    with capsys.disabled():
        print(f" [bfloat16 weights, learning rate 2e-6, ten steps: {share:.1%} moved]", end="")
    assert 0 < share < 0.05
    assert caplog.text.count(LOST) == 1
    assert "--dtype float32 --bf16 true" in caplog.text
    assert "--use_peft true" in caplog.text


def test_float32_weights_all_move_and_nothing_is_said(tmp_path, caplog, capsys):
    share = moved(tmp_path, torch.float32)
    with capsys.disabled():
        print(f" [float32 weights, learning rate 2e-6, ten steps: {share:.1%} moved]", end="")
    assert share > 0.99
    assert LOST not in caplog.text


def test_adapters_on_bfloat16_weights_are_float32(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    models = {role: embedded(name, torch.bfloat16) for role, name in
              (("student", "student-standard"), ("teacher", "teacher"))}  # fmt: skip
    trainer = tiny_trainer(
        tmp_path, **models, learning_rate=1e-5, max_steps=1, tokenizer=TOKENIZER,
        trainer_options={"peft_config": adapters},
    )  # fmt: skip
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert LOST not in caplog.text


@pytest.mark.parametrize("deepspeed", [False, True])
def test_under_deepspeed_which_keeps_float32_weights_nothing_is_said(deepspeed):
    callbacks = []
    watch_rounding(SimpleNamespace(is_deepspeed_enabled=deepspeed, add_callback=callbacks.append))
    assert [type(each) for each in callbacks] == ([] if deepspeed else [RoundingWarning])


def test_the_warm_start_says_it_too(tmp_path, caplog):
    rows = [{"prompt": "what is 1+2×3?", "completion": " so the answer is 7"}] * 8
    args = WarmStartConfig(
        str(tmp_path), kd_ratio=0, learning_rate=2e-6, max_steps=1, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no",
    )  # fmt: skip
    for dtype, times in ((torch.float32, 0), (torch.bfloat16, 1)):
        student = embedded("student-standard", dtype)
        WarmStartTrainer(student, args=args, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER).train()
        assert caplog.text.count(LOST) == times


@pytest.mark.parametrize("preflight", ["true", "false"])
def test_the_command_says_it_once(tmp_path, caplog, capsys, preflight):
    command = [
        "train", "--config", "recipe:embedded", "--max_steps", "2", "--per_device_train_batch_size", "2",
        "--max_completion_length", "6", "--window_length", "3", "--dtype", "bfloat16", "--learning_rate", "2e-6",
        "--preflight", preflight, "--output_dir", str(tmp_path),
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr()
    assert (said.out + said.err + caplog.text).count(LOST) == 1


def dtypes_of(trainer):
    """(role, whether gradients are kept) -> the dtypes that linear layers compute in during two training steps."""
    seen = {}
    trainer._try_ways()  # before the first use, in the models' own dtype
    for role, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        for name in ("q_proj", "down_proj"):
            for module in (each for path, each in model.named_modules() if path.endswith(name)):
                module.register_forward_hook(
                    lambda _, __, out, role=role: seen.setdefault((role, out.requires_grad), set()).add(out.dtype)
                )
    trainer.train()
    return seen


@pytest.mark.parametrize("options", OURS, ids=str)
def test_bf16_computes_in_bf16_in_sampling_scoring_windows_and_loss(tmp_path, options):
    trainer = tiny_trainer(tmp_path, bf16=True, max_steps=1, **options)
    seen = dtypes_of(trainer)
    assert set(seen) == {("student", False), ("student", True), ("teacher", False)}
    assert set.union(*seen.values()) == {torch.bfloat16}
    assert not [module for module in trainer.model.model.modules() if "forward" in vars(module)]  # put back


def test_bf16_losses_are_near_those_of_float32(tmp_path):
    trainer = tiny_trainer(tmp_path, bf16=True)
    with trainer._autocast():
        batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(4)])
        bf16 = trainer.compute_loss(trainer.model, dict(batch)).item()
    exact = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert bf16 != exact
    assert bf16 == pytest.approx(exact, rel=0.02)


def test_the_plain_loss_of_trl_computes_as_trl_does(tmp_path):
    """Bit for bit the same as `DistillationTrainer`: tests/training/test_parity_with_trl.py."""
    seen = dtypes_of(tiny_trainer(tmp_path, bf16=True, max_steps=1, method="opd", opd_loss="trl"))
    assert seen["student", True] == seen["teacher", False] == {torch.float32}
