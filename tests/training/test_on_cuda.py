"""On a CUDA device: `pytest -m cuda`, a few minutes. The same steps as on the CPU; Triton's loss; padding; windows."""

import warnings
from dataclasses import replace

import pytest
import torch
from one_step import CASES, step
from test_cuda_without_gpu import MOST_WAITS
from tiny import TOKENIZER, tiny_model
from torch.testing import assert_close

from topd.algorithm import Head, distillation_loss
from topd.near_future import DistilledModel, LocalModel, Places, Rollouts
from topd.near_future.distilled_model import loss_on_device

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here (pytest -m cuda on one)"),
]


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_cuda_is_the_step_on_the_cpu(case):
    here, there = step(**CASES[case]), step(**CASES[case], use_cpu=False)
    rel = 0.05 if "bfloat16" in case else 1e-3
    assert there["loss"] == pytest.approx(here["loss"], rel=rel)
    assert there["gradient"] == pytest.approx(here["gradient"], rel=rel)


def test_the_host_waits_as_often_as_on_the_pretended_device(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(use_cpu=False, student_window="regenerated")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(each.message) for each in caught)
    with capsys.disabled():
        print(f" [waits: {waits}, sampling included]", end="")
    assert 0 < waits <= 2 * MOST_WAITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_triton_s_loss_is_ours(dtype, direction):
    torch.manual_seed(0)
    hidden, theirs, head, their_head = (
        torch.randn(*shape) / 8 for shape in ((700, 64), (700, 96), (40_000, 64), (40_000, 96))
    )
    results = []
    for device, loss in (("cpu", distillation_loss), (DEVICE, loss_on_device)):
        inputs = [each.to(device, dtype).requires_grad_() for each in (hidden, head)]
        teacher = Head(their_head.to(device, dtype))
        weights = torch.full((700,), 1 / 700, device=device)
        found = loss(inputs[0], Head(inputs[1]), theirs.to(device, dtype), teacher, weights, None, direction)
        results.append([found.loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(found.loss, inputs))])
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-4}
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **tolerance)


def pair_of(dtype):
    model = tiny_model(0).to(DEVICE, dtype).eval()
    return model, DistilledModel(model, LocalModel(model, TOKENIZER.pad_token_id, []))


def rollouts_of(padding, length=24):
    torch.manual_seed(1)
    ids = torch.randint(3, len(TOKENIZER), (2, 8 + length), device=DEVICE)
    ids = torch.nn.functional.pad(ids, (padding, 0))
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    prompt = padding + 8
    return Rollouts(ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:], mask[:, prompt:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_on_the_left_changes_nothing(dtype):
    _, pair = pair_of(dtype)
    exact, padded = (pair.hidden(rollouts_of(padding)).float() for padding in (0, 5))
    assert (padded - exact).norm() < (1e-4 if dtype == torch.float32 else 0.2) * exact.norm()


def test_windows_over_one_prefix_are_those_of_generate():
    model, pair = pair_of(torch.float32)
    rollouts = rollouts_of(0)
    reading = pair.prefill(rollouts)
    greedy = model.get_output_embeddings()(reading.hidden).argmax(-1)
    rows, positions = torch.tensor([0, 0, 1], device=DEVICE), torch.tensor([0, 7, 20], device=DEVICE)
    windows = pair.continue_(Places(rollouts, rows, positions), 6, replace(reading, greedy=greedy))
    for window, prefix in zip(windows.tokens, Places(rollouts, rows, positions).prefixes(), strict=True):
        alone = model.generate(prefix[None], do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert window.tolist() == alone[0, len(prefix) :].tolist()
