"""Merged adapters compute what the adapted model computes, on models whose head and embeddings are one tensor too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, tiny_model
from transformers import AutoModelForCausalLM

from topd.cli.main import main
from topd.errors import TOPDError
from topd.loading import adapters as merging
from topd.loading.adapters import merged_adapter
from topd.loading.models import loaded_model
from topd.near_future.model_parts import output_head

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 12, 7, 30]])
ON_THE_ENDS = [
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
]


def adapted(base: Any, **options: Any) -> Any:
    """An adapter that changes the logits, with random weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config).eval()
    for name, weight in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(weight.data)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("options", ON_THE_ENDS, ids=str)
def test_an_adapter_on_head_or_embeddings_of_a_tied_model_merges_right(tmp_path: Path, options: dict[str, Any]) -> None:
    """As loaded from its folder, and as written and loaded again."""
    base = tiny_model(0).eval()
    assert base.config.tie_word_embeddings
    TOKENIZER.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    plain = logits(base)
    model = adapted(base, **options)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert (expected - plain).abs().max() > 1
    torch.testing.assert_close(logits(loaded_model(str(tmp_path / "adapter"))[0]), expected, rtol=1e-3, atol=1e-3)
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)


def test_without_an_adapter_on_them_head_and_embeddings_stay_one() -> None:
    merged = merged_adapter(adapted(tiny_model(0), target_modules=["q_proj", "v_proj"]))
    assert merged.config.tie_word_embeddings
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_a_merge_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the head not copied."""
    monkeypatch.setattr(merging, "untie_adapted_head", lambda base: None)
    with pytest.raises(TOPDError, match=r"logits change by .* of their spread"):
        merged_adapter(adapted(tiny_model(0).eval(), target_modules=["embed_tokens"]))


def test_an_adapter_on_the_output_head_is_in_the_loss_and_learns() -> None:
    """For the warm start; TRL refuses it in distillation."""
    student = adapted(tiny_model(0), target_modules=["lm_head"])
    states = torch.randn(3, student.config.hidden_size)
    expected = student.get_output_embeddings()(states)
    head = output_head(student)
    torch.testing.assert_close(head.logits(states), expected, rtol=1e-4, atol=1e-4)
    with student.disable_adapter():
        assert not torch.allclose(output_head(student).logits(states), expected, atol=1e-2)
    head.logits(states).square().mean().backward()
    gradients = {name: weight.grad for name, weight in student.named_parameters() if "lora_" in name}
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("options", ON_THE_ENDS, ids=str)
def test_the_loss_has_the_head_that_the_adapted_model_has(options: dict[str, Any]) -> None:
    student = adapted(tiny_model(0), **options)
    states = torch.randn(3, student.config.hidden_size)
    expected = student.get_output_embeddings()(states)
    torch.testing.assert_close(output_head(student).logits(states), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
        peft.LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        peft.LoHaConfig(r=2, target_modules=["lm_head"]),
        peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"]),
    ],
    ids=["DoRA", "bias", "IA3", "LoHa", "tokens"],
)
def test_a_kind_of_adapter_that_the_loss_cannot_follow_is_refused(config: Any) -> None:
    model = peft.get_peft_model(tiny_model(0), config)
    with pytest.raises(TOPDError, match="only plain LoRA"):
        output_head(model)
    with model.disable_adapter():
        torch.testing.assert_close(output_head(model).weight, tiny_model(0).lm_head.weight)


def test_an_adapter_is_merged_into_a_base_whose_packed_weights_take_no_gradient(tmp_path: Path) -> None:
    """As in 4 and 8 bits, of a base that was saved quantized."""
    adapted(tiny_model(0), target_modules=["q_proj"]).save_pretrained(tmp_path)
    base = tiny_model(0)
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    base.model.register_parameter("packed", packed)
    whole = merging.merged(base, str(tmp_path))
    trained = {name: parameter.requires_grad for name, parameter in whole.named_parameters()}
    assert [name for name, trains in trained.items() if not trains] == ["model.packed"]
