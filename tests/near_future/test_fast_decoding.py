"""A model with adapters runs merged while it samples, and is as before afterwards."""

from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_shared_prefix import model_of
from tiny import tiny_trainer

from topd.loading.precision import autocasting
from topd.near_future.fast_decoding import adapters_merged, tokens_by_inversion, weights_packed

IDS = torch.arange(3, 23).reshape(2, 10)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(targets="all-linear", dtype=torch.float32, kind="qwen3", tied=False, **options):
    base = model_of(kind).to(dtype)
    if tied:
        base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits_and_calls(model):
    """The logits, and how often an adapter's matrix was used."""
    calls = []
    handles = [
        module.register_forward_hook(lambda *given: calls.append(given))
        for name, module in model.named_modules()
        if name.endswith("lora_A.default")
    ]
    logits = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    return logits, len(calls)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_same_logits_without_the_adapters_products_and_the_same_weights_afterwards(options):
    model = adapted(**options)
    before, (expected, calls) = {n: p.clone() for n, p in model.state_dict().items()}, logits_and_calls(model)
    assert calls > 0
    with adapters_merged(model):
        merged, merged_calls = logits_and_calls(model)
    assert merged_calls == 0
    assert torch.allclose(merged, expected, atol=1e-4)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())
    assert torch.equal(logits_and_calls(model)[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q_proj", "lm_head"]}, {"targets": ["embed_tokens"]}, {"dtype": torch.bfloat16}, {"tied": True},
        {"kind": "qwen3-moe", "targets": ["q_proj"], "target_parameters": EXPERTS}, {"lora_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_merge_would_change_is_left_alone(options):
    """Tied weights, embeddings, weights that would be rounded, and what PEFT cannot merge."""
    model = adapted(**options)
    expected, calls = logits_and_calls(model)
    with adapters_merged(model):
        again, calls_again = logits_and_calls(model)
    assert torch.equal(again, expected)
    assert calls_again == calls


def test_under_autocast_which_would_round_the_adapters_away_nothing_is_merged():
    model = adapted()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    with autocasting([model], SimpleNamespace(native_amp=True, distributed_type=None, autocast=autocast)):
        expected, calls = logits_and_calls(model)
        with adapters_merged(model):
            again, calls_again = logits_and_calls(model)
    assert torch.equal(again, expected)
    assert calls_again == calls > 0


def test_training_samples_with_merged_adapters(tmp_path, monkeypatch):
    seen = []
    trainer = tiny_trainer(
        tmp_path, method="topd", compact_sampling=True, max_steps=3,
        trainer_options={"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")},
    )  # fmt: skip
    sample = type(trainer.model).generate

    def watched(model, *args, **kwargs):
        seen.append([module.merged for module in model.modules() if hasattr(module, "merged")])
        return sample(model, *args, **kwargs)

    monkeypatch.setattr(type(trainer.model), "generate", watched)
    trainer.train()
    assert len(seen) >= 3, "TRL puts a forward pass on the model after the first step"
    assert all(all(merged) and merged for merged in seen)
    assert not any(module.merged for module in trainer.model.modules() if hasattr(module, "merged"))


# ------------------------------------------------------------------------------------------------------- packed weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_packed_weights_compute_the_same_logits_and_are_gone_afterwards(kind, amp, dtype):
    """With adapters; with biases, and weights that no linear layer holds (gpt-oss)."""
    model = adapted("all-linear", dtype, kind) if kind == "qwen3" else model_of(kind).to(dtype)
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected = model(input_ids=IDS).logits
        with weights_packed(model):
            packed = model(input_ids=IDS).logits
    assert packed.dtype == expected.dtype
    assert torch.allclose(packed.float(), expected.float(), atol=1e-4 if dtype == torch.float32 and not amp else 0.05)
    assert all(vars(module).keys() == before[name].keys() for name, module in model.named_modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "inputs", [torch.rand(7), torch.rand(3, 5, 7)[:, -1:], torch.rand(4, 7, 2).mT], ids=["1", "slice", "T"]
)
def test_packed_layers_take_inputs_of_any_shape(inputs, bias):
    model = torch.nn.Sequential(torch.nn.Linear(7, 6, bias=bias))
    with torch.no_grad():
        expected = model(inputs)
        with weights_packed(model):
            assert torch.allclose(model(inputs), expected, atol=1e-6)


def test_packed_layers_have_gradients_and_refuse_another_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(7, 6))
    with weights_packed(model):
        model(torch.rand(2, 7)).sum().backward()
        assert model[0].weight.grad is not None
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            model(torch.rand(2, 7, dtype=torch.bfloat16))


def test_without_memory_for_copies_nothing_is_packed(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(7, 6))
    for free, packed in ((10 * 7 * 6 * 4, True), (7 * 6 * 4, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        with weights_packed(model):
            assert ("forward" in vars(model[0])) == packed


def test_layers_with_a_forward_of_their_own_are_left_alone():
    """Hooks of accelerate, which bring weights from elsewhere, stand there."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.Linear(6, 5, device="meta"))
    own = model[0].forward
    model[0].forward = own
    with weights_packed(model):
        assert vars(model[0])["forward"] is own
        assert "forward" not in vars(model[1])
    assert vars(model[0])["forward"] is own


# -------------------------------------------------------------------------------------------- one random number a token


def test_tokens_follow_the_distribution_and_impossible_ones_are_never_drawn():
    torch.manual_seed(0)
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    with tokens_by_inversion():
        drawn = torch.multinomial(shares.expand(20_000, -1), num_samples=1)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert drawn.shape == (20_000, 1)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert torch.allclose(counts / 20_000, shares, atol=0.015)  # 4 standard deviations


@pytest.mark.parametrize("shares", [[float("nan"), 0.5], [float("inf"), 0.5], [-1.0, 0.5], [0.0, 0.0]])
def test_what_is_no_distribution_is_an_error_as_without(shares):
    with tokens_by_inversion(), pytest.raises(RuntimeError, match="prob"):
        torch.multinomial(torch.tensor([[0.5, 0.5], shares]), num_samples=1)
