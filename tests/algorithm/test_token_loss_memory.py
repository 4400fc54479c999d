"""Peak memory: tokens x vocabulary never exists at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topd.algorithm import Head, LikelihoodTerms, distillation_loss, gathered_log_probs, score_tokens, token_kl


class LiveElements(TorchDispatchMode):
    """Counts the elements of tensors that operations return and that are still alive, less those of what was given.

    `peak` is the most that were alive at once, `largest` the biggest single tensor. An operation's scratch is not seen.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                size = storage.nbytes() // tensor.element_size()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), size))
                self.largest = max(self.largest, size)
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


VOCABULARY, TILE = 512, 4 * 512  # a tile holds 4 positions
Models = tuple[Tensor, Head, Tensor, Head]


def models(positions: int) -> Models:
    """Student states and head, teacher states and head."""
    student = torch.randn(positions, 2, requires_grad=True), Head(torch.randn(VOCABULARY, 2, requires_grad=True))
    return *student, torch.randn(positions, 3), Head(torch.randn(VOCABULARY, 3))


def meter(run: Callable[[Models, Tensor], Tensor], positions: int) -> LiveElements:
    """What `run` of models and tokens, and the backward pass where there is one, have alive at once."""
    inputs, tokens = models(positions), torch.zeros(positions, dtype=torch.long)
    hidden, student, teacher_hidden, teacher = inputs
    with LiveElements(hidden, student.weight, teacher_hidden, teacher.weight, tokens) as live:
        loss = run(inputs, tokens)
        if loss.requires_grad:
            loss.backward()
            assert hidden.grad is not None
    return live


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_token_loss_keeps_a_few_tiles_whatever_the_number_of_positions(direction: str) -> None:
    def tiled(inputs: Models, tokens: Tensor) -> Tensor:
        mean = torch.full((len(tokens),), 1 / len(tokens))
        return distillation_loss(*inputs, mean, direction=direction, tile_elements=TILE).loss

    def whole(inputs: Models, tokens: Tensor) -> Tensor:
        hidden, head, teacher_hidden, teacher = inputs
        return token_kl(head.logits(hidden), teacher.logits(teacher_hidden), direction).mean()

    few, many, all_at_once = meter(tiled, 16), meter(tiled, 128), meter(whole, 128)
    assert all_at_once.largest == 128 * VOCABULARY  # the meter sees what it should
    assert all_at_once.peak > 3 * 128 * VOCABULARY
    assert many.largest == TILE  # one tile's logits are the biggest thing ever made
    assert many.peak < 4 * TILE  # both models' logits, in place, and the terms of the forward KL
    assert many.peak - few.peak < 10 * 112  # beyond that only a few numbers for each of 112 more positions


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_likelihood_terms_on_every_row_keep_a_few_tiles_too(direction: str) -> None:
    def one_pass(inputs: Models, tokens: Tensor) -> Tensor:
        hidden, head, teacher_hidden, teacher = inputs
        half = len(tokens) // 2  # the teacher has fewer rows; every row carries a term
        terms = LikelihoodTerms(torch.arange(len(tokens)), tokens, torch.ones(len(tokens)))
        return distillation_loss(
            hidden, head, teacher_hidden[:half], teacher, torch.ones(half), terms, direction, TILE
        ).loss

    few, many = meter(one_pass, 16), meter(one_pass, 128)
    assert many.largest == TILE
    assert many.peak < 5 * TILE  # two buffers, the head's gradient (here half a tile), the terms of the forward KL
    assert many.peak - few.peak < 20 * 112


def test_a_softcap_costs_one_more_tile() -> None:
    def one_pass(inputs: Models, tokens: Tensor) -> Tensor:
        hidden, head, teacher_hidden, teacher = inputs
        capped = Head(head.weight, softcap=3.0)
        weights = torch.ones(len(tokens))
        return distillation_loss(hidden, capped, teacher_hidden, teacher, weights, None, "reverse", TILE).loss

    assert meter(one_pass, 128).peak < 5 * TILE


def test_bf16_heads_are_cast_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topd.algorithm.vocabulary.SLICE_ELEMENTS", 256)
    hidden, weight = torch.randn(8, 64).bfloat16().requires_grad_(), torch.randn(VOCABULARY, 64).bfloat16()
    with LiveElements(hidden, weight) as live:
        distillation_loss(hidden, Head(weight), hidden.detach(), Head(weight), torch.ones(8), None, "reverse", TILE)
    assert live.largest < weight.numel() / 4


def test_a_frozen_head_costs_no_gradient() -> None:
    hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(VOCABULARY, 64)
    with LiveElements(hidden, weight) as live:
        frozen = Head(weight)
        distillation_loss(hidden, frozen, hidden.detach(), frozen, torch.ones(8), None, "reverse", TILE).loss.backward()
    assert live.largest < weight.numel()


def test_gathered_log_probs_keep_one_tiles_logits() -> None:
    def tiled(inputs: Models, tokens: Tensor) -> Tensor:
        return gathered_log_probs(*inputs[:2], tokens[:, None], TILE).mean()

    few, many = meter(tiled, 16), meter(tiled, 128)
    assert many.largest == TILE
    assert many.peak < 3 * TILE
    assert many.peak - few.peak < 20 * 112


def test_scores_keep_a_few_tiles() -> None:
    def tiled(inputs: Models, tokens: Tensor) -> Tensor:
        return score_tokens(*inputs, tokens, "reverse", TILE).kl

    few, many = meter(tiled, 16), meter(tiled, 128)
    assert many.largest == TILE
    assert many.peak < 3 * TILE
    assert many.peak - few.peak < 12 * 112
