"""TRL's divergence as our token loss: the same heads, the same numbers.

With TRITON_INTERPRET=1 its Triton kernels run instead of their twins in torch, through Triton's interpreter: see
`make triton`.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from trl.kernels import chunked_divergence

from topd.algorithm import Head, LikelihoodTerms, distillation_loss
from topd.near_future import distilled_model

POSITIONS, VOCABULARY, WIDTH, TEACHER_WIDTH = 5, 13, 3, 4
HEADS = {
    "plain": ({}, {}),
    "biased": ({"bias": True}, {"bias": True}),
    "scaled": ({"scale": 0.7}, {"scale": 1.9}),
    "softcapped": ({"softcap": 1.3}, {"softcap": 2.0, "scale": 0.5}),
    "cooled alike": ({"softcap": 1.3, "temperature": 0.6}, {"temperature": 0.6}),
    "cooled each its own way": ({"temperature": 0.6, "scale": 1.1}, {"temperature": 1.7}),
    "one softcap, two temperatures": ({"temperature": 0.6, "bias": True}, {"temperature": 1.7, "softcap": 1.5}),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and blocks, as with a real vocabulary; under the interpreter no way around the kernels."""
    for name, size in {"TOKEN_CHUNK_SIZE": 2, "VOCAB_CHUNK_SIZE": 8, "_BLOCK_SIZE": 4}.items():
        monkeypatch.setattr(chunked_divergence, name, size)
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(chunked_divergence, "_use_triton", lambda device: True)
        for twin in ("_stats_tile", "_jsd_tile", "_backward_tile"):
            monkeypatch.setattr(chunked_divergence, twin, None)


@pytest.mark.slow
def test_the_same_through_triton_s_interpreter():
    pytest.importorskip("triton", reason="make triton installs it in an environment of its own")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-m", "not slow"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(width: int, seed: int, bias: bool = False, **shape) -> Head:
    weight = random(VOCABULARY, width, seed=seed).requires_grad_()
    return Head(weight, random(VOCABULARY, seed=seed + 1).requires_grad_() if bias else None, **shape)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("shapes", HEADS.values(), ids=HEADS.keys())
def test_trl_s_values_and_gradients_are_ours(shapes, direction):
    hidden, theirs = random(POSITIONS, WIDTH, seed=1).requires_grad_(), random(POSITIONS, TEACHER_WIDTH, seed=2)
    head, teacher = head_of(WIDTH, 3, **shapes[0]), head_of(TEACHER_WIDTH, 5, **shapes[1])
    inputs = [each for each in (hidden, head.weight, head.bias) if each is not None]
    arguments = distilled_model.trl_arguments(head, teacher)
    values = distilled_model.trl_token_kl(hidden, head, theirs, teacher, direction, arguments)
    upstream = random(POSITIONS, seed=7)
    ours = distillation_loss(hidden, head, theirs, teacher, upstream, None, direction)
    assert_close(values.detach(), ours.token_loss)
    for one, other in zip(
        torch.autograd.grad(values, inputs, upstream), torch.autograd.grad(ours.loss, inputs), strict=True
    ):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_heads_that_trl_cannot_express_are_known():
    capped = head_of(WIDTH, 1, softcap=2.0, temperature=0.5)
    assert distilled_model.trl_arguments(capped, head_of(WIDTH, 2, softcap=2.0)) is None
    hole = torch.zeros(VOCABULARY)
    hole[0] = -math.inf
    assert distilled_model.trl_arguments(Head(capped.weight, hole), capped) is None


@pytest.mark.parametrize("with_terms", [False, True])
def test_with_weights_and_terms_too(with_terms):
    hidden, theirs = random(POSITIONS, WIDTH, seed=1).requires_grad_(), random(POSITIONS - 2, TEACHER_WIDTH, seed=2)
    head, teacher = head_of(WIDTH, 3), head_of(TEACHER_WIDTH, 5)
    weights = torch.tensor([0.5, 0.0, 2.0])
    terms = LikelihoodTerms(torch.tensor([0, 4, 4]), torch.tensor([3, 12, 3]), torch.tensor([0.5, 1.5, 0.1]))
    terms = terms if with_terms else None
    trl = distilled_model.trl_loss(
        hidden, head, theirs, teacher, weights, terms, "reverse", distilled_model.trl_arguments(head, teacher)
    )
    ours = distilled_model.loss_on_device(hidden, head, theirs, teacher, weights, terms)
    for one, other in zip(trl, ours, strict=True):
        assert_close(one, other)
    inputs = [hidden, head.weight]
    for one, other in zip(torch.autograd.grad(trl.loss, inputs), torch.autograd.grad(ours.loss, inputs), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_elsewhere_than_on_cuda_our_tiles_do_it(monkeypatch):
    monkeypatch.setattr(distilled_model, "trl_token_kl", None)
    hidden, head = random(POSITIONS, WIDTH, seed=1), head_of(WIDTH, 3)
    assert distilled_model.loss_on_device(hidden, head, hidden, head, torch.ones(POSITIONS)).loss == 0
