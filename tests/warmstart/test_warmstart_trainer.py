"""The warm start's loss: plain SFT at one end, the teacher's distribution at the other."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import TOKENIZER, tiny_model
from trl import SFTTrainer

from topd.cli.warmstart import save
from topd.embedded.task import TEACHER, make_problems, write_solution
from topd.errors import DataError, TOPDError
from topd.loading.adapters import is_adapter
from topd.warmstart import WarmStartConfig, WarmStartTrainer


def solutions(n: int = 24) -> Dataset:
    import random

    rng = random.Random(0)
    problems = make_problems(n, 0, held_out=False)
    return Dataset.from_list([{"prompt": p.prompt, "completion": write_solution(p, TEACHER, rng)} for p in problems])


def trainer(out: Any, kd_ratio: float = 0.5, trainer_type: type = WarmStartTrainer, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "optim": "sgd",
        "lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    more: dict[str, Any] = {"peft_config": options.pop("peft_config", None), "eval_dataset": options.pop("eval", None)}
    if trainer_type is WarmStartTrainer:
        more["teacher_model"] = options.pop("teacher") if "teacher" in options else tiny_model(1, width=96)
    args = WarmStartConfig(str(out), kd_ratio=kd_ratio, **(defaults | options))
    return trainer_type(
        model=tiny_model(0), args=args, train_dataset=solutions(), processing_class=TOKENIZER, **more
    )  # fmt: skip


def losses(trained: Any, name: str = "loss") -> list[float]:
    trained.train()
    return [float(entry[name]) for entry in trained.state.log_history if name in entry]


def weights(trained: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.model.parameters()])


def naive_loss(student: Any, teacher: Any, batch: dict[str, torch.Tensor], kd_ratio: float) -> torch.Tensor:
    """Whole logits, one solution at a time, the definition of both losses."""
    total, count = torch.tensor(0.0), 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        ours = student(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        theirs = teacher(input_ids=ids[None, :length]).logits[0].log_softmax(-1).detach()
        for place in range(1, length):
            if labels[place] != -100:
                p, q = theirs[place - 1], ours[place - 1]
                kl = (p.exp() * (p - q)).sum()
                total = total + kd_ratio * kl - (1 - kd_ratio) * q[ids[place]]
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "There is nothing to train on"),
        ([], "train_dataset has no rows"),
        ([{"prompt": "1+1", "response": "2"}], "its columns are prompt, response. Rename"),
    ],
)
def test_a_dataset_without_solutions_ends_in_a_message(tmp_path, rows, said):
    dataset = None if rows is None else Dataset.from_list(rows)
    args = WarmStartConfig(str(tmp_path), kd_ratio=0, use_cpu=True, bf16=False)
    with pytest.raises(DataError, match=said):
        WarmStartTrainer(tiny_model(0), args=args, train_dataset=dataset, processing_class=TOKENIZER)


def test_an_evaluation_without_rows_and_a_student_that_is_not_there_end_in_a_message(tmp_path):
    with pytest.raises(DataError, match="eval_dataset has no rows"):
        trainer(tmp_path, eval=solutions().select([]))
    args = WarmStartConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TOPDError, match=r"Cannot load the config of /nowhere: .* Give a folder"):
        WarmStartTrainer("/nowhere", "embedded:teacher", args=args, train_dataset=solutions())


def test_a_length_that_leaves_no_solution_is_named(tmp_path):
    with pytest.raises(TOPDError, match="If max_length 3 truncates them, raise it"):
        trainer(tmp_path, max_length=3)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"kd_ratio": "0.5"}, "kd_ratio is '0.5'; write a number"),
        ({"max_length": "100"}, "max_length is '100'; write a whole number or nothing"),
        ({"chat_template_kwargs": "no"}, "chat_template_kwargs must be `name: value` lines or a JSON object"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(tmp_path, option, said):
    with pytest.raises(ValueError, match=said):
        WarmStartConfig(str(tmp_path), use_cpu=True, bf16=False, **option)
    assert WarmStartConfig(str(tmp_path), use_cpu=True, bf16=False, learning_rate="2e-5").learning_rate == 2e-5


def test_without_the_teacher_it_is_trl_s_sft_bit_for_bit(tmp_path):
    theirs = trainer(tmp_path / "sft", 0.0, SFTTrainer, gradient_accumulation_steps=2, optim="adamw_torch")
    ours = trainer(tmp_path / "ours", 0.0, teacher=None, gradient_accumulation_steps=2, optim="adamw_torch")
    assert losses(ours) == losses(theirs)
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("packing", [False, True])
def test_our_cross_entropy_alone_is_trl_s_sft_to_rounding(tmp_path, packing):
    """A teacher that hardly counts: the same denominator, shift, packing and accumulation as SFTTrainer."""
    options = {"gradient_accumulation_steps": 2, "packing": packing, "max_length": 256}
    theirs = trainer(tmp_path / "sft", 0.0, SFTTrainer, **options)
    ours = trainer(tmp_path / "ours", 1e-12, **options)
    before = weights(ours)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    moved = (weights(theirs) - before).norm()
    assert (weights(ours) - weights(theirs)).norm() < 1e-4 * moved


@pytest.mark.parametrize("kd_ratio", [1.0, 0.5, 0.1])
def test_the_loss_and_its_gradient_are_the_definition_s(tmp_path, kd_ratio):
    teacher = tiny_model(1, width=96)
    ours = trainer(tmp_path, kd_ratio, teacher=teacher)
    batch = next(iter(ours.get_train_dataloader()))
    loss = ours.compute_loss(ours.model, dict(batch))
    loss.backward()
    student = tiny_model(0)
    expected = naive_loss(student, teacher, batch, kd_ratio)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(ours.model.parameters(), student.parameters(), strict=True):
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm()


def test_a_packed_row_is_its_solutions_apart(tmp_path):
    padded = trainer(tmp_path / "padded", per_device_train_batch_size=24)
    packed = trainer(tmp_path / "packed", per_device_train_batch_size=24, packing=True, max_length=256)
    rows, one_row = (next(iter(each.get_train_dataloader())) for each in (padded, packed))
    assert "attention_mask" not in one_row
    assert (one_row["position_ids"] == 0).sum() == 24
    assert padded.compute_loss(padded.model, dict(rows)).item() == pytest.approx(
        packed.compute_loss(packed.model, dict(one_row)).item(), rel=1e-5
    )
    assert padded._metrics["train"]["num_tokens"] == packed._metrics["train"]["num_tokens"]


def test_training_brings_the_student_to_the_teacher_and_leaves_the_teacher_alone(tmp_path):
    teacher = tiny_model(1, width=96)
    before = [parameter.clone() for parameter in teacher.parameters()]
    ours = trainer(tmp_path, 1.0, teacher=teacher, max_steps=30, optim="adamw_torch", learning_rate=3e-3)
    kl = losses(ours, "forward_kl")
    assert kl[-1] < 0.6 * kl[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_whole_logits_are_never_asked_for(tmp_path):
    teacher = tiny_model(1, width=96)
    ours = trainer(tmp_path, teacher=teacher, max_steps=1)

    def refuse(*_):
        raise AssertionError("logits")

    for model in (ours.model, teacher):
        model.get_output_embeddings().register_forward_hook(refuse)
    assert len(losses(ours)) == 1


def test_bf16_runs_both_models_in_bf16_and_the_losses_in_float32(tmp_path):
    teacher = tiny_model(1, width=96)
    ours = trainer(tmp_path, teacher=teacher, max_steps=1, bf16=True)
    seen = []
    for model in (ours.model, teacher):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    loss = losses(ours)
    assert seen == [torch.bfloat16] * 2
    assert loss == pytest.approx(losses(trainer(tmp_path / "float32", max_steps=1)), rel=0.02)


def test_evaluation_measures_both_parts(tmp_path):
    ours = trainer(tmp_path, eval=solutions(6))
    measured = ours.evaluate()
    parts = 0.5 * measured["eval_forward_kl"] + 0.5 * measured["eval_cross_entropy"]
    assert measured["eval_loss"] == pytest.approx(parts, rel=0.05)  # the mean of batches, which differ in length


def test_lora_trains_the_adapter_alone(tmp_path):
    from peft import LoraConfig

    ours = trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"), max_steps=3)
    before = {name: parameter.clone() for name, parameter in ours.model.named_parameters()}
    assert len(losses(ours)) == 3
    moved = {name for name, parameter in ours.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_nan_stops_before_the_optimizer_moves(tmp_path):
    from topd.errors import NonFiniteError

    ours = trainer(tmp_path)
    with torch.no_grad():
        ours.model.model.norm.weight[0] = torch.nan
    before = weights(ours)
    with pytest.raises(NonFiniteError, match=r"not finite at step 1.*no checkpoint was saved yet. Start again"):
        ours.train()
    assert torch.equal(weights(ours).nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_ratio": 1.5}, "must be in"),
        ({"label_smoothing_factor": 0.1}, "kd_ratio=0"),
        ({"teacher": None}, "needs a teacher_model"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_a_smaller_head_of_the_teacher_is_refused_and_a_larger_one_is_cut(tmp_path):
    teacher = tiny_model(1)
    teacher.resize_token_embeddings(len(TOKENIZER) - 8)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        trainer(tmp_path, teacher=teacher)
    padded = tiny_model(1, width=96)
    padded.resize_token_embeddings(len(TOKENIZER) + 8)
    assert losses(trainer(tmp_path / "a", teacher=padded)) == losses(trainer(tmp_path / "b"))


def test_sharded_weights_are_not_merged_in_one_process(tmp_path, monkeypatch):
    """Merging multiplies parts of two processes: one alone would wait for the other forever."""
    peft = pytest.importorskip("peft")
    trained = trainer(tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert save(trained, tmp_path) == tmp_path / "adapter"
    assert is_adapter(tmp_path / "adapter")
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert save(trained, tmp_path) == tmp_path
    assert (tmp_path / "model.safetensors").exists()
