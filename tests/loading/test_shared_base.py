"""Two adapters on one base train as two separate models do: the same losses, windows and gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM

from topd.cli.main import main
from topd.errors import TOPDError
from topd.loading.pair import prepared_models
from topd.loading.shared_base import share_base, without_adapters
from topd.loading.tokenizers import tokenizer_of
from topd.training.config import TOPDConfig
from topd.training.several_teachers import MOPDTrainer
from topd.training.trainer import TOPDTrainer

peft = pytest.importorskip("peft")
WINDOWS: dict[str, dict[str, Any]] = {
    "rollout": {"embedding": "teacher"},
    "regenerated": {"student_window": "regenerated", "embedding": "teacher_hidden"},
    "teacher's contexts": {"guidance_context": "teacher"},
    "plain, TRL's loss": {"method": "opd", "opd_loss": "trl"},
}


class Seen(TOPDTrainer):
    """Keeps the windows of each step, and the gradients before the optimizer moves."""

    def _record(self, future: Any, guided: Any, rollouts: Any, method: Any) -> None:
        both = future.look.candidates.ours.tokens, future.look.candidates.theirs.tokens
        self.__dict__.setdefault("windows", []).append(both)
        super()._record(future, guided, rollouts, method)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.__dict__.setdefault("gradients", []).append(gradients)
        return loss


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A base, and two adapters on it that change what it says."""
    base = tmp_path / "base"
    tiny_model(0).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    return {"base": str(base)} | {
        name: adapter_on(base, name, seed) for seed, name in enumerate(("student", "teacher"))
    }


def adapter_on(base: Path, name: str, seed: int = 0, **options: Any) -> str:
    torch.manual_seed(seed)
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = peft.LoraConfig(**defaults | options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(base.parent / name)
    return str(base.parent / name)


def trained(out: Path, student: Any, teacher: Any, **options: Any) -> Any:
    trainer = tiny_trainer(out, Seen, student=student, teacher=teacher, max_steps=2, learning_rate=1e-2, **options)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_held(*models: Any) -> int:
    return sum({p.data_ptr(): p.numel() for model in models for p in model.parameters()}.values())


@pytest.mark.parametrize("case", WINDOWS)
def test_two_adapters_on_one_base_train_as_two_models(tmp_path: Path, folders: dict[str, str], case: str) -> None:
    def apart() -> list[Any]:
        models = [AutoModelForCausalLM.from_pretrained(folders["base"]) for _ in range(2)]
        trains = {"student": True, "teacher": False}
        return [
            peft.PeftModel.from_pretrained(model, folders[name], is_trainable=each)
            for model, (name, each) in zip(models, trains.items(), strict=True)
        ]

    two = trained(tmp_path / "two", *apart(), **WINDOWS[case])
    one = trained(tmp_path / "one", folders["student"], folders["teacher"], **WINDOWS[case])
    assert losses(one) == losses(two)
    assert min(losses(two)) > 0.01
    for ours, theirs in zip(one.__dict__.get("windows", []), two.__dict__.get("windows", []), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    for ours, theirs in zip(one.gradients, two.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        assert all("lora_" in name and torch.equal(ours[name], theirs[name]) for name in ours)
    base = tiny_model(0).num_parameters()
    assert weights_held(two.model, two.teacher_model) > 2 * base
    assert weights_held(one.model, one.teacher_model) < 1.2 * base
    plain = tiny_model(0).state_dict()
    shared = [name for name, _ in one.teacher_model.named_parameters() if "lora_" not in name]
    assert all(
        torch.equal(one.teacher_model.get_parameter(n), plain[n.replace(WRAPPED, "").replace(".base_layer", "")])
        for n in shared
    )
    assert not any(p.requires_grad for p in one.teacher_model.parameters())


WRAPPED = "base_model.model."


def test_a_new_adapter_learns_from_another_one_on_its_base(tmp_path: Path, folders: dict[str, str]) -> None:
    """Its gradients are those of a teacher on its own, merged base."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    kinds = folders["teacher"], folders["merged"] if "merged" in folders else merged(folders["teacher"])
    runs = [
        trained(tmp_path / str(n), folders["base"], teacher, trainer_options={"peft_config": config})
        for n, teacher in enumerate(kinds)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)
    assert weights_held(runs[0].model, runs[0].teacher_model) < 1.2 * tiny_model(0).num_parameters()


def merged(adapter: str) -> str:
    assert main(["merge", adapter, "--out", f"{adapter}-merged"]) == 0
    return f"{adapter}-merged"


def test_the_base_teaches_a_trained_adapter_on_the_same_weights(tmp_path: Path, folders: dict[str, str]) -> None:
    trainer = trained(tmp_path / "run", folders["student"], folders["base"])
    assert min(losses(trainer)) > 0.01
    assert weights_held(trainer.model, trainer.teacher_model) < 1.2 * tiny_model(0).num_parameters()


def test_adapters_that_need_their_own_base_get_it(tmp_path: Path, folders: dict[str, str]) -> None:
    """On other bases, on the output head, with an initialization that changes the base, in another dtype."""
    base = Path(folders["base"])
    other = tmp_path / "other" / "base"
    tiny_model(3).save_pretrained(other)
    TOKENIZER.save_pretrained(other)
    teachers = {
        "other base": adapter_on(other, "teacher", 1),
        "head": adapter_on(base, "head", 1, target_modules=["lm_head", "q_proj"]),
        "embeddings": adapter_on(base, "embeddings", 1, target_modules=["embed_tokens"]),
        "pissa": adapter_on(base, "pissa", 1, init_lora_weights="pissa"),
        "biases": adapter_on(base, "biases", 1, bias="all"),
    }
    ids = torch.arange(3, 20)[None]
    for name, teacher in teachers.items():
        pair = prepared_models(folders["student"], teacher, tiny_config(tmp_path / name), TOKENIZER)
        assert not pair.shared
        assert not isinstance(pair.teacher, peft.PeftModel)
        alone = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(other if name == "other base" else base), teacher
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(pair.teacher.eval()(ids).logits, alone(ids).logits, rtol=1e-3, atol=1e-3)
    args = tiny_config(tmp_path / "dtype", teacher_model_init_kwargs={"dtype": "bfloat16"})
    pair = prepared_models(folders["student"], folders["teacher"], args, TOKENIZER)
    assert not pair.shared
    assert pair.teacher.dtype == torch.bfloat16
    pissa = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    assert not prepared_models(
        folders["base"], folders["teacher"], tiny_config(tmp_path / "p"), TOKENIZER, pissa
    ).shared
    model = tiny_model(0)
    with pytest.raises(TOPDError, match="pissa changes the base's weights"):
        tiny_trainer(tmp_path / "q", student=model, teacher=model, trainer_options={"peft_config": pissa})


def test_what_cannot_be_a_pair_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(TOPDError, match="same model"):
        tiny_trainer(tmp_path / "a", student=folders["student"], teacher=folders["student"])
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(TOPDError, match=r"trained further; use_peft would add another one.*topd merge"):
        tiny_trainer(tmp_path / "b", student=folders["student"], trainer_options={"peft_config": config})
    file = Path(folders["teacher"]) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", "k_proj", "v_proj"]}))
    with pytest.raises(TOPDError, match=r"does not fit its base.*missing adapter keys"):
        tiny_trainer(tmp_path / "c", student=folders["student"], teacher=folders["teacher"])


def test_several_adapters_teach_on_one_base(tmp_path: Path, folders: dict[str, str]) -> None:
    from tiny import prompts

    second = adapter_on(Path(folders["base"]), "second", 7)
    rows = prompts(16).add_column("teacher", ["a", "b"] * 8)
    teachers = {"a": folders["teacher"], "b": second}
    found = []
    for each in (teachers, {name: merged(folder) for name, folder in teachers.items()}):
        trainer = tiny_trainer(
            tmp_path / str(len(found)), MOPDTrainer, rows, student=folders["student"], teacher=each, max_steps=2
        )
        trainer.train()
        found.append((losses(trainer), weights_held(trainer.model, *trainer._teachers)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert found[0][1] < 1.3 * tiny_model(0).num_parameters() < 3 * tiny_model(0).num_parameters() < found[1][1]


def test_a_run_of_adapters_by_the_command_line_resumes_bit_for_bit(tmp_path: Path, folders: dict[str, str]) -> None:
    def command(out: str, *more: str) -> list[str]:
        return [
            *("train", "--student", folders["student"], "--teacher", folders["teacher"], "--data", "embedded"),
            *("--output_dir", str(tmp_path / out), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"),
            *("--per_device_train_batch_size", "2", "--max_completion_length", "12", "--window_length", "4"),
            *("--save_steps", "2", "--gradient_checkpointing", "false", "--learning_rate", "1e-2", *more),
        ]

    assert main(command("whole", "--max_steps", "4")) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    assert main(command("parts", "--max_steps", "4", "--resume_from_checkpoint", "true")) == 0
    files = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert files[0] == files[1]
    assert files[0] != (Path(folders["student"]) / "adapter_model.safetensors").read_bytes()
    assert not (tmp_path / "whole" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    ],
    ids=str,
)
def test_wrappers_inside_wrappers_are_taken_off_together(options: dict[str, Any]) -> None:
    """Of two parameters of one module, and of single tokens."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=47, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, pad_token_id=0,
    )  # fmt: skip
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    student = peft.get_peft_model(transformers.Qwen3MoeForCausalLM(config), adapters).eval()
    teacher, ids = without_adapters(student).eval(), torch.arange(3, 13)[None]
    with torch.no_grad(), student.disable_adapter():
        assert torch.equal(teacher(input_ids=ids).logits, student(input_ids=ids).logits)
    assert not [name for name in teacher.state_dict() if "lora" in name or "base_layer" in name]


def test_with_vllm_the_teacher_has_weights_of_its_own(tmp_path: Path, folders: dict[str, str]) -> None:
    """TRL merges adapters into the base to send the student to vLLM, which rounds the base each time."""
    args = TOPDConfig(str(tmp_path), use_vllm=True, use_cpu=True, bf16=False)
    student = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders["base"]).bfloat16(), folders["student"], is_trainable=True
    )
    assert not share_base(folders["student"], folders["base"], args)
    pair = prepared_models(student, "self", args, tokenizer_of(folders["base"]))
    before = {name: value.clone() for name, value in pair.teacher.state_dict().items()}
    base = student.get_base_model()
    started = {name: value.clone() for name, value in base.state_dict().items()}
    student.merge_adapter()
    student.unmerge_adapter()
    assert any(not torch.equal(value, started[name]) for name, value in base.state_dict().items())
    assert not pair.shared
    assert "own copy of the student's base" in pair.notes[0]
    assert all(torch.equal(value, before[name]) for name, value in pair.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in pair.teacher.parameters())
