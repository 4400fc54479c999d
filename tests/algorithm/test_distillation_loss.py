"""The training loss in one pass: values, gradients taken in the forward pass, and what they may be skipped for."""

import math
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import Head, LikelihoodTerms, distillation_loss, score_tokens, token_kl
from topd.algorithm.vocabulary import Tiles

POSITIONS, TEACHER_POSITIONS, VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 9, 6, 11, 3, 4
SHAPES = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "softcapped": {"softcap": 1.3},
    "cooled": {"temperature": 0.6},
    "everything": {"scale": 1.4, "softcap": 2.0, "temperature": 1.7},
}
directions = pytest.mark.parametrize("direction", ["reverse", "forward"])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
tile_sizes = pytest.mark.parametrize("tile_elements", [1, 2 * VOCABULARY, 4 * VOCABULARY + 5, None])
TERMS = LikelihoodTerms(  # twice the same, two tokens at one row, rows inside and beyond the teacher's, a weight of 0
    torch.tensor([8, 0, 2, 2, 7, 8, 0, 5]),
    torch.tensor([1, 4, 10, 0, 3, 1, 6, 2]),
    torch.tensor([0.5, 1.0, 0.2, 0.3, 2.0, 0.5, 0.0, 0.7], dtype=torch.float64),
)
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.25, 0.0], dtype=torch.float64)  # row 1: nothing; row 5: only a term


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student(**shape: Any) -> tuple[Tensor, Head]:
    weight = random_tensor(VOCABULARY, STUDENT_WIDTH, seed=2).requires_grad_()
    bias = random_tensor(VOCABULARY, seed=3).requires_grad_()
    return random_tensor(POSITIONS, STUDENT_WIDTH, seed=1).requires_grad_(), Head(weight, bias, **shape)


def teacher(rows: int = TEACHER_POSITIONS) -> tuple[Tensor, Head]:
    weight = random_tensor(VOCABULARY, TEACHER_WIDTH, seed=5)
    return random_tensor(rows, TEACHER_WIDTH, seed=4), Head(weight, random_tensor(VOCABULARY, seed=6), scale=0.8)


def naive(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    terms: LikelihoodTerms | None = None,
    direction: str = "reverse",
) -> Tensor:
    """The same with whole logits and autograd."""
    logits = head.logits(hidden)
    loss = (weights * token_kl(logits[: len(weights)], teacher_head.logits(teacher_hidden), direction)).sum()
    if terms is not None:
        loss = loss - (terms.weight * logits.log_softmax(-1)[terms.position, terms.token]).sum()
    return loss


def gradients(loss: Tensor, hidden: Tensor, head: Head, upstream: float = 1.0) -> tuple[Tensor, ...]:
    inputs = [each for each in (hidden, head.weight, head.bias) if each is not None and each.requires_grad]
    return torch.autograd.grad(loss * upstream, inputs)


def assert_all_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@shapes
@directions
@tile_sizes
def test_the_loss_and_its_gradients_are_those_of_the_whole_logits(
    shape: Any, direction: str, tile_elements: int | None
) -> None:
    given = *student(**shape), *teacher(), WEIGHTS, TERMS, direction
    result, whole = distillation_loss(*given, tile_elements), naive(*given)
    assert_close(result.loss, whole)
    assert_all_close(gradients(result.loss, *given[:2], -2.5), gradients(whole, *given[:2], -2.5))


@shapes
@directions
def test_the_values_are_those_of_the_oracle(shape: Any, direction: str) -> None:
    (hidden, head), (teacher_hidden, teacher_head) = student(**shape), teacher()
    result = distillation_loss(hidden, head, teacher_hidden, teacher_head, WEIGHTS, TERMS, direction, 25)
    student_logits = oracles.head_logits(hidden.detach(), head.weight.detach(), head.bias.detach(), **shape)
    teacher_logits = oracles.head_logits(teacher_hidden, teacher_head.weight, teacher_head.bias, 0.8)
    expected = oracles.distillation_loss(student_logits, teacher_logits, WEIGHTS, TERMS, direction)
    assert result.loss.item() == pytest.approx(expected, rel=1e-10)
    kl = oracles.token_kl(student_logits[:TEACHER_POSITIONS], teacher_logits, direction)
    assert_close(result.token_loss, kl)  # unweighted, also where the weight is 0
    assert_close(result.nll, oracles.token_nll(student_logits[TERMS.position], TERMS.token))
    assert not result.token_loss.requires_grad
    assert not result.nll.requires_grad


@shapes
@directions
def test_the_gradient_is_the_central_difference_of_each_entry(shape: Any, direction: str) -> None:
    hidden, head = student(**shape)
    given = *teacher(), WEIGHTS, TERMS, direction, 25
    inputs = hidden, head.weight, head.bias

    def loss_with(which: int, entry: int, step: float) -> float:
        moved = [each.detach().clone() for each in inputs]
        moved[which].view(-1)[entry] += step
        return distillation_loss(moved[0], replace(head, weight=moved[1], bias=moved[2]), *given).loss.item()

    for which, gradient in enumerate(gradients(distillation_loss(hidden, head, *given).loss, hidden, head)):
        for entry, slope in enumerate(gradient.flatten().tolist()):
            difference = loss_with(which, entry, 1e-5) - loss_with(which, entry, -1e-5)
            assert slope == pytest.approx(difference / 2e-5, rel=1e-5, abs=1e-8)


@given(seed=st.integers(0, 2**20), rows=st.integers(0, 4), extra=st.integers(0, 3), terms=st.integers(0, 6))
def test_any_numbers_of_rows_and_terms(seed: int, rows: int, extra: int, terms: int) -> None:
    hidden = random_tensor(rows + extra, 3, seed=seed).requires_grad_()
    head, teacher_head = (
        Head(random_tensor(5, 3, seed=seed + 1).requires_grad_()),
        Head(random_tensor(5, 2, seed=seed + 2)),
    )
    draw = torch.Generator().manual_seed(seed)
    terms = terms if rows + extra else 0
    likelihood = LikelihoodTerms(
        torch.randint(max(1, rows + extra), (terms,), generator=draw),
        torch.randint(5, (terms,), generator=draw),
        torch.rand(terms, generator=draw, dtype=torch.float64),
    )
    weights = torch.randint(3, (rows,), generator=draw).double()
    given = hidden, head, random_tensor(rows, 2, seed=seed + 3), teacher_head, weights, likelihood
    result, whole = distillation_loss(*given, "reverse", 10), naive(*given)
    assert_close(result.loss, whole)
    assert_all_close(gradients(result.loss, hidden, head), gradients(whole, hidden, head))


def test_without_terms_it_is_the_weighted_token_loss() -> None:
    (hidden, head), (teacher_hidden, teacher_head) = student(), teacher()
    result = distillation_loss(hidden, head, teacher_hidden, teacher_head, WEIGHTS)
    values = token_kl(head.logits(hidden[:TEACHER_POSITIONS]), teacher_head.logits(teacher_hidden))
    assert_close(result.token_loss, values.detach())
    assert result.nll.shape == (0,)
    ours = gradients(result.loss, hidden, head)
    assert_all_close(ours, gradients((WEIGHTS * values).sum(), hidden, head))
    assert (ours[0][TEACHER_POSITIONS:] == 0).all()  # rows that carry nothing
    assert (ours[0][WEIGHTS.nonzero().squeeze()].abs().sum(-1) > 0).all()


def test_likelihood_terms_alone_need_no_teacher_rows() -> None:
    (hidden, head), (teacher_hidden, teacher_head) = student(), teacher(0)
    result = distillation_loss(hidden, head, teacher_hidden, teacher_head, WEIGHTS[:0], TERMS, tile_elements=25)
    whole = naive(hidden, head, teacher_hidden, teacher_head, WEIGHTS[:0], TERMS)
    assert_close(result.loss, whole)
    assert_all_close(gradients(result.loss, hidden, head), gradients(whole, hidden, head))


def test_what_is_frozen_gets_no_gradient() -> None:
    (hidden, head), given = student(), (*teacher(), WEIGHTS, TERMS)
    frozen = Head(head.weight.detach(), head.bias.detach())
    whole = gradients(naive(hidden, head, *given), hidden, head)
    assert_all_close(gradients(distillation_loss(hidden, frozen, *given).loss, hidden, frozen), whole[:1])
    states = hidden.detach()
    assert_all_close(gradients(distillation_loss(states, head, *given).loss, states, head), whole[1:])
    teacher_hidden, teacher_head = given[0].requires_grad_(), given[1]
    teacher_head.weight.requires_grad_()
    distillation_loss(hidden, head, teacher_hidden, teacher_head, *given[2:]).loss.backward()
    assert teacher_hidden.grad is None
    assert teacher_head.weight.grad is None


def test_without_gradients_only_values_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, head), given = student(), (*teacher(), WEIGHTS, TERMS)
    expected = distillation_loss(hidden, head, *given)
    monkeypatch.setattr("topd.algorithm.vocabulary.Tiles.collect", None)
    with torch.no_grad():
        values = distillation_loss(hidden, head, *given)
    frozen = distillation_loss(hidden.detach(), Head(head.weight.detach(), head.bias.detach()), *given)
    for result in (values, frozen):
        assert not result.loss.requires_grad
        assert result.outside_top_k is None
        for ours, theirs in zip(result[:3], expected[:3], strict=True):
            assert_close(ours, theirs.detach())


def test_a_weight_of_0_silences_an_infinite_token_loss() -> None:
    (hidden, head), (teacher_hidden, teacher_head) = student(), teacher(2)
    hole = torch.zeros(VOCABULARY, dtype=torch.float64)
    hole[3] = -math.inf
    given = hidden, head, teacher_hidden, Head(teacher_head.weight, hole), WEIGHTS.new_zeros(2)
    silent, likely = distillation_loss(*given), distillation_loss(*given, TERMS)
    assert silent.token_loss.isinf().all()
    assert silent.loss == 0
    assert all((gradient == 0).all() for gradient in gradients(silent.loss, hidden, head))
    terms_alone = distillation_loss(hidden, head, teacher_hidden[:0], teacher_head, WEIGHTS[:0], TERMS)
    assert_close(likely.loss, terms_alone.loss)
    assert_all_close(gradients(likely.loss, hidden, head), gradients(terms_alone.loss, hidden, head))


@directions
def test_a_vocabulary_masked_by_the_bias_equals_the_smaller_one(direction: str) -> None:
    (hidden, head), (teacher_hidden, teacher_head) = student(), teacher()
    hole = torch.zeros(VOCABULARY, dtype=torch.float64)
    hole[-1:] = -math.inf
    terms = TERMS._replace(token=TERMS.token.clamp(max=VOCABULARY - 2))
    wide = Head(head.weight, head.bias + hole), teacher_hidden, Head(teacher_head.weight, hole), WEIGHTS, terms
    small = Head(head.weight[:-1], head.bias[:-1]), teacher_hidden, Head(teacher_head.weight[:-1]), WEIGHTS, terms
    ours = distillation_loss(hidden, *wide, direction, 25).loss
    theirs = distillation_loss(hidden, *small, direction, 25).loss
    assert_close(ours, theirs)
    assert_all_close(
        torch.autograd.grad(ours, (hidden, head.weight)), torch.autograd.grad(theirs, (hidden, head.weight))
    )


def test_a_second_backward_is_refused() -> None:
    loss = distillation_loss(*student(), *teacher(), WEIGHTS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unequal_vocabularies_and_a_teacher_with_more_rows_are_refused() -> None:
    (hidden, head), (teacher_hidden, teacher_head) = student(), teacher()
    other = Head(teacher_head.weight[:-2])
    with pytest.raises(RuntimeError, match="11 and 9 tokens"):
        distillation_loss(hidden, head, teacher_hidden, other, WEIGHTS)
    with pytest.raises(RuntimeError, match="11 and 9 tokens"):
        score_tokens(hidden[:TEACHER_POSITIONS], head, teacher_hidden, other, torch.arange(TEACHER_POSITIONS))
    with pytest.raises(ValueError, match=r"n, n and at least n rows, not \(6, 6, 5\)"):
        distillation_loss(hidden[:5], head, teacher_hidden, teacher_head, WEIGHTS)


def near_pair(gap: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """16-bit states and head of a student with realistic logits, and of a teacher `gap` away from it."""
    hidden, weight = random_tensor(96, 64, seed=1), random_tensor(2048, 64, seed=2) * 0.3
    theirs, their_weight = (
        hidden + gap * random_tensor(96, 64, seed=3),
        weight + 0.1 * gap * random_tensor(2048, 64, seed=4),
    )
    return tuple(each.to(dtype) for each in (hidden, weight, theirs, their_weight))


@pytest.mark.parametrize(("gap", "least", "most"), [(0.045, 0.003, 0.008), (0.14, 0.03, 0.08), (0.45, 0.3, 0.8)])
def test_bf16_gradients_are_within_0_3_percent(gap: float, least: float, most: float) -> None:
    """Of the float64 gradients at the same bf16 inputs, at mean KLs of about 0.005, 0.05 and 0.5."""
    hidden, weight, theirs, their_weight = near_pair(gap)
    mean = torch.full((96,), 1 / 96, dtype=torch.float64)
    exact_head = Head(weight.double().requires_grad_(), temperature=0.9)
    exact_hidden = hidden.double().requires_grad_()
    exact = naive(exact_hidden, exact_head, theirs.double(), Head(their_weight.double(), temperature=0.9), mean)
    assert least < exact.item() < most
    references = gradients(exact, exact_hidden, exact_head)
    head, teacher_head = Head(weight.requires_grad_(), temperature=0.9), Head(their_weight, temperature=0.9)
    hidden.requires_grad_()
    loss = distillation_loss(hidden, head, theirs, teacher_head, mean, tile_elements=20 * 2048).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    for ours, reference in zip(gradients(loss, hidden, head, 0.3), references, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() / 0.3 - reference).norm() < 0.003 * reference.norm()


def test_float16_gradients_do_not_underflow_before_the_loss_scale() -> None:
    """With 1 / 8,000 response tokens as weights, the gradients of single logits are below float16's smallest number."""
    hidden, weight, theirs, their_weight = near_pair(0.14, torch.float16)
    weights = torch.full((96,), 1 / 8000, dtype=torch.float64)
    terms = LikelihoodTerms(torch.arange(96), torch.arange(96), 0.01 * weights)
    exact_hidden, exact_head = hidden.double().requires_grad_(), Head(weight.double().requires_grad_())
    teacher_head = Head(their_weight.double())
    exact = naive(exact_hidden, exact_head, theirs.double(), teacher_head, weights, terms)
    references = gradients(exact, exact_hidden, exact_head, 2.0**16)
    hidden.requires_grad_()
    head = Head(weight.requires_grad_())
    loss = distillation_loss(hidden, head, theirs, Head(their_weight), weights, terms).loss
    for ours, reference in zip(gradients(loss, hidden, head, 2.0**16), references, strict=True):
        assert ours.dtype == torch.float16
        assert (ours.double() - reference).norm() < 0.001 * reference.norm()


def test_a_float16_head_gradient_overflows_only_by_the_loss_scale() -> None:
    """States of real models hold large activations, and the head's gradient is a sum over all positions."""
    hidden, weight = random_tensor(8000, 16, seed=1), random_tensor(64, 16, seed=2) * 0.3
    hidden[:, 0], weight[:, 0] = 1000, 0
    teacher = weight.clone()
    teacher[5, 0] = 0.003  # a logit of 3 more at every position
    head = weight.half().requires_grad_()
    weights = torch.full((8000,), 1 / 8000)
    loss = distillation_loss(hidden.half(), Head(head), hidden.half(), Head(teacher.half()), weights).loss
    (gradient,) = torch.autograd.grad(loss, head)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 65504 / 4096  # for weights of about 1 it would overflow in float16


def test_terms_of_weight_zero_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`opd_loss` asks for the likelihoods of sampled tokens, which it only logs."""
    collected = []
    monkeypatch.setattr(Tiles, "collect", lambda _, rows: collected.append(rows))
    (hidden, head), (teacher_hidden, teacher_head) = student(), teacher(0)
    silent = TERMS._replace(weight=torch.zeros_like(TERMS.weight))
    found = distillation_loss(hidden, head, teacher_hidden, teacher_head, WEIGHTS[:0], silent)
    assert_close(found.nll, -head.logits(hidden).log_softmax(-1)[TERMS.position, TERMS.token].detach())
    assert found.loss == 0
    assert not collected


def test_float32_heads_are_converted_once_for_all_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast gives bfloat16 states over float32 weights."""
    usual, dtypes = Head.write_logits, set()

    def watched(self: Head, hidden: Tensor, out: Tensor) -> Tensor:
        dtypes.add((hidden.dtype, self.weight.dtype))
        return usual(self, hidden, out)

    monkeypatch.setattr(Head, "write_logits", watched)
    heads = [replace(head, weight=head.weight.detach().float(), bias=None) for _, head in (student(), teacher())]
    states = [random_tensor(TEACHER_POSITIONS, head.weight.shape[1], seed=1, dtype=torch.bfloat16) for head in heads]
    tokens = torch.zeros(TEACHER_POSITIONS, dtype=torch.long)
    score_tokens(states[0], heads[0], states[1], heads[1], tokens, tile_elements=VOCABULARY)
    distillation_loss(states[0], heads[0], states[1], heads[1], WEIGHTS.float(), tile_elements=VOCABULARY)
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}
