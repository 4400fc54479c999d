"""Teachers of 4 and 8 bits: the options reach `from_pretrained`, and a step works with what comes back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, tiny_model, tiny_trainer

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitsandbytes, 4 bits": (
        "bitsandbytes",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
    ),
    "bitsandbytes, 8 bits": ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "quanto, 8 bits": ("optimum.quanto", {"quant_method": "quanto", "weights": "int8"}),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_teacher_trains_nearly_as_the_whole_one(tmp_path: Path, name: str) -> None:
    package, config = CONFIGS[name]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    for seed, role in enumerate(("student", "teacher")):
        tiny_model(seed, 64, scale=2.0).save_pretrained(tmp_path / role)
        TOKENIZER.save_pretrained(tmp_path / role)
    found = []
    for options in (None, {"quantization_config": config}):
        trainer = tiny_trainer(
            tmp_path / "run" / str(options is None), student=str(tmp_path / "student"),
            teacher=str(tmp_path / "teacher"), teacher_model_init_kwargs=options, max_steps=1,
            student_window="regenerated", embedding="teacher", generation_kwargs={"do_sample": False},
        )  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
        layer = trainer.teacher_model.model.layers[0].self_attn.q_proj
        assert (type(layer) is torch.nn.Linear) == (options is None)
        assert type(trainer.teacher_model.lm_head) is torch.nn.Linear
    assert found[0] != found[1] == pytest.approx(found[0], rel=0.1)


def test_the_options_reach_from_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the base of an adapter."""
    peft = pytest.importorskip("peft")
    from transformers import PreTrainedModel

    tiny_model(0).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(tiny_model(0), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    seen: list[Any] = []
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def noting(cls: Any, name: Any, *args: Any, quantization_config: Any = None, **options: Any) -> Any:
        seen.append((name, quantization_config))
        model = original(cls, name, *args, **options)
        model.is_quantized = quantization_config is not None
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noting))
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for teacher in ("base", "adapter"):
        trainer = tiny_trainer(
            tmp_path / "run" / teacher, teacher=str(tmp_path / teacher),
            teacher_model_init_kwargs={"quantization_config": config},
        )  # fmt: skip
        assert seen.pop() == (str(tmp_path / "base"), config)
        assert isinstance(trainer.teacher_model, peft.PeftModel) == (teacher == "adapter")  # not merged
