"""The token loss from hidden states, tile by tile; output heads; scores and log-probabilities of tokens."""

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import Head, distillation_loss, gathered_log_probs, score_tokens, token_kl

POSITIONS, VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 7, 11, 3, 4
MEAN = torch.full((POSITIONS,), 1 / POSITIONS, dtype=torch.float64)
SHAPES = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "softcapped": {"softcap": 1.3},
    "cooled": {"temperature": 0.6},
    "everything": {"scale": 1.4, "softcap": 2.0, "temperature": 1.7},
}
directions = pytest.mark.parametrize("direction", ["reverse", "forward"])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
tile_sizes = pytest.mark.parametrize("tile_elements", [1, 2 * VOCABULARY, 3 * VOCABULARY + 5, 2**22])


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def models(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Head]:
    """Student hidden states, weight, bias; teacher hidden states, head. The widths differ."""
    return (
        random_tensor(POSITIONS, STUDENT_WIDTH, seed=1, dtype=dtype).requires_grad_(),
        random_tensor(VOCABULARY, STUDENT_WIDTH, seed=2, dtype=dtype).requires_grad_(),
        random_tensor(VOCABULARY, seed=3, dtype=dtype).requires_grad_(),
        random_tensor(POSITIONS, TEACHER_WIDTH, seed=4, dtype=dtype),
        Head(random_tensor(VOCABULARY, TEACHER_WIDTH, seed=5, dtype=dtype), scale=0.8),
    )


@given(
    seed=st.integers(0, 2**20),
    positions=st.integers(0, 4),
    scale=st.floats(0.1, 3),
    softcap=st.none() | st.floats(0.5, 5),
    temperature=st.floats(0.3, 2),
    biased=st.booleans(),
)
def test_the_logits_of_a_head_are_those_of_the_oracle(
    seed: int, positions: int, scale: float, softcap: float | None, temperature: float, biased: bool
) -> None:
    hidden, weight = random_tensor(positions, 3, seed=seed), random_tensor(5, 3, seed=seed + 1)
    bias = random_tensor(5, seed=seed + 2) if biased else None
    logits = Head(weight, bias, scale, softcap, temperature).logits(hidden)
    assert_close(logits, oracles.head_logits(hidden, weight, bias, scale, softcap, temperature))


def test_a_head_worked_by_hand() -> None:
    hidden = torch.tensor([[1.0, 2.0]])
    head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]]), torch.tensor([1.0, -2.0, 4.0]), 0.5, 2.0, 4.0)
    # h W^T + b = (1, 2, 1) + (1, -2, 4) = (2, 0, 5); times 0.5 = (1, 0, 2.5); 2 tanh(./2) / 4 = tanh(0.5, 0, 1.25) / 2
    assert_close(head.logits(hidden).tolist(), [[0.231059, 0.0, 0.424142]], atol=1e-6, rtol=0)


@shapes
@directions
@tile_sizes
def test_values_and_gradients_equal_those_of_the_whole_logits(shape: Any, direction: str, tile_elements: int) -> None:
    hidden, weight, bias, teacher_hidden, teacher = models()
    head = Head(weight, bias, **shape)
    upstream = random_tensor(POSITIONS, seed=6)  # a different weight on each position, some of them negative
    tiled = distillation_loss(hidden, head, teacher_hidden, teacher, upstream, None, direction, tile_elements)
    whole = token_kl(head.logits(hidden), teacher.logits(teacher_hidden), direction)
    assert_close(tiled.token_loss, whole.detach())
    gradients = torch.autograd.grad(tiled.loss, (hidden, weight, bias))
    for ours, theirs in zip(gradients, torch.autograd.grad(whole, (hidden, weight, bias), upstream), strict=True):
        assert_close(ours, theirs)


@directions
def test_the_gradient_is_the_central_difference_along_a_random_direction(direction: str) -> None:
    *inputs, teacher_hidden, teacher = models()
    along = [random_tensor(*each.shape, seed=20 + i) for i, each in enumerate(inputs)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, 0.9, 3.0, 0.8)
        return distillation_loss(hidden, head, teacher_hidden, teacher, MEAN, None, direction, 25).loss

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    slope = sum((gradient * way).sum() for gradient, way in zip(gradients, along, strict=True))
    ahead, behind = (
        loss(*(each.detach() + step * way for each, way in zip(inputs, along, strict=True))) for step in (1e-5, -1e-5)
    )
    assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_head_changed_between_forward_and_backward_is_refused_where_backward_recomputes_logits() -> None:
    hidden, weight, _, _, _ = models()
    values = gathered_log_probs(hidden, Head(weight), torch.zeros(POSITIONS, 1, dtype=torch.long))
    with torch.no_grad():
        weight *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@directions
def test_bf16_hidden_states_give_float32_values_and_bf16_gradients(direction: str) -> None:
    hidden, weight, bias, teacher_hidden, teacher = models(torch.bfloat16)
    result = distillation_loss(hidden, Head(weight, bias), teacher_hidden, teacher, MEAN, None, direction, 25)
    assert result.loss.dtype == result.token_loss.dtype == torch.float32
    assert (result.token_loss > -1e-6).all()
    double = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    teacher64 = Head(teacher.weight.double(), scale=0.8)
    exact = distillation_loss(
        double[0], Head(double[1], double[2]), teacher_hidden.double(), teacher64, MEAN, None, direction
    )
    # logits are never rounded to bf16
    assert_close(result.token_loss.double(), exact.token_loss, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(result.loss, (hidden, weight, bias))
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    for ours, theirs in zip(gradients, torch.autograd.grad(exact.loss, double), strict=True):
        assert_close(ours.double(), theirs, rtol=0.02, atol=2e-3)


def test_a_small_kl_of_bf16_states_is_zero_for_equal_models_and_keeps_its_gradient() -> None:
    hidden, weight, _, _, _ = models(torch.bfloat16)
    teacher_hidden = hidden.detach().clone()
    teacher_hidden[1:] *= 1.02
    result = distillation_loss(hidden, Head(weight), teacher_hidden, Head(weight.detach()), torch.ones(POSITIONS))
    assert result.token_loss[0] == 0
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert (gradient[0] == 0).all()
    assert (gradient[1:].abs().sum(-1) > 0).all()


def test_no_positions_give_no_values_and_a_zero_gradient() -> None:
    hidden, weight, bias, teacher_hidden, teacher = models()
    result = distillation_loss(hidden[:0], Head(weight, bias), teacher_hidden[:0], teacher, MEAN[:0])
    assert result.token_loss.shape == (0,)
    for gradient in torch.autograd.grad(result.loss, (hidden, weight, bias)):
        assert (gradient == 0).all()


@given(seed=st.integers(0, 2**20), rows=st.integers(1, 6))
def test_a_batch_equals_the_loop_and_follows_a_permutation(seed: int, rows: int) -> None:
    student, teacher = Head(random_tensor(5, 3, seed=seed)), Head(random_tensor(5, 2, seed=seed + 1))
    hidden, teacher_hidden = random_tensor(rows, 3, seed=seed + 2), random_tensor(rows, 2, seed=seed + 3)

    def values(rows: Any, tile_elements: int | None = 12) -> Tensor:
        states, theirs = hidden[rows], teacher_hidden[rows]
        weights = torch.ones(len(states), dtype=torch.float64)
        return distillation_loss(states, student, theirs, teacher, weights, tile_elements=tile_elements).token_loss

    batch = values(slice(None))
    assert_close(batch, torch.cat([values([i], None) for i in range(rows)]))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert_close(values(order), batch[order])


@shapes
@directions
@tile_sizes
def test_scores_of_sampled_tokens_are_those_of_the_oracles(shape: Any, direction: str, tile_elements: int) -> None:
    hidden, weight, bias, teacher_hidden, teacher = models()
    tokens = torch.arange(POSITIONS) % VOCABULARY
    scores = score_tokens(
        hidden, Head(weight, bias, **shape), teacher_hidden, teacher, tokens, direction, tile_elements
    )
    student_logits = oracles.head_logits(hidden.detach(), weight.detach(), bias.detach(), **shape)
    teacher_logits = oracles.head_logits(teacher_hidden, teacher.weight, scale=0.8)
    assert_close(scores.kl, oracles.token_kl(student_logits, teacher_logits, direction))
    assert_close(scores.teacher_nll, oracles.token_nll(teacher_logits, tokens))
    assert_close(scores.student_nll, oracles.token_nll(student_logits, tokens))
    assert_close(scores.entropy, oracles.entropy(student_logits))
    assert scores.student_greedy.tolist() == [row.index(max(row)) for row in student_logits.tolist()]
    assert scores.teacher_greedy.tolist() == [row.index(max(row)) for row in teacher_logits.tolist()]
    assert not any(score.requires_grad for score in scores)


def test_scores_of_a_masked_vocabulary_of_bf16_states_and_of_no_tokens_are_numbers() -> None:
    hidden, weight, _, teacher_hidden, teacher = models(torch.bfloat16)
    hole = torch.zeros(VOCABULARY)
    hole[-2:] = -math.inf
    tokens = torch.arange(POSITIONS)
    scores = score_tokens(hidden, Head(weight, hole), teacher_hidden, Head(teacher.weight, hole), tokens)
    small = score_tokens(hidden, Head(weight[:-2]), teacher_hidden, Head(teacher.weight[:-2]), tokens)
    for ours, theirs in zip(scores, small, strict=True):
        assert_close(ours, theirs)
    assert {score.dtype for score in scores} == {torch.float32, torch.int64}
    empty = score_tokens(hidden[:0], Head(weight), teacher_hidden[:0], teacher, tokens[:0])
    assert [score.shape for score in empty] == [(0,)] * 6


@directions
def test_scores_of_bf16_states_are_those_of_float64(direction: str) -> None:
    hidden, weight, bias, teacher_hidden, teacher = models(torch.bfloat16)
    tokens = torch.arange(POSITIONS)
    scores = score_tokens(hidden, Head(weight, bias), teacher_hidden, teacher, tokens, direction, 25)
    exact = score_tokens(
        hidden.double(), Head(weight.double(), bias.double()), teacher_hidden.double(),
        Head(teacher.weight.double(), scale=0.8), tokens, direction,
    )  # fmt: skip
    for ours, theirs in zip(scores[:4], exact[:4], strict=True):  # logits are never rounded to bf16
        assert ours.dtype == torch.float32
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.student_greedy, exact.student_greedy)
    assert torch.equal(scores.teacher_greedy, exact.teacher_greedy)


def test_the_greedy_token_is_the_first_of_equal_ones() -> None:
    hidden, weight = random_tensor(POSITIONS, 3, seed=1).round(), random_tensor(VOCABULARY, 3, seed=2).round()
    twice = Head(torch.cat([weight, weight]))  # integers, so that sums are exact
    scores = score_tokens(hidden, twice, -hidden, twice, torch.arange(POSITIONS))
    for greedy, logits in (scores.student_greedy, hidden @ weight.T), (scores.teacher_greedy, -hidden @ weight.T):
        assert greedy.tolist() == [row.index(max(row)) for row in logits.tolist()]


@given(
    seed=st.integers(0, 2**20),
    scale=st.floats(0.1, 3),
    softcap=st.none() | st.floats(0.5, 5),
    temperature=st.floats(0.3, 2),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_logits_written_in_place_are_those_of_the_definition(
    seed: int, scale: float, softcap: float | None, temperature: float, biased: bool, dtype: torch.dtype
) -> None:
    hidden, weight = random_tensor(4, 3, seed=seed, dtype=dtype), random_tensor(5, 3, seed=seed + 1, dtype=dtype)
    bias = random_tensor(5, seed=seed + 2, dtype=dtype) if biased else None
    head, wide = Head(weight, bias, scale, softcap, temperature), torch.promote_types(dtype, torch.float32)
    logits = head.logits(hidden)
    assert logits.dtype == wide
    assert_close(head.write_logits(hidden, torch.empty(4, 5, dtype=wide)), logits)
    exact = Head(weight.double(), None if bias is None else bias.double(), scale, softcap, temperature)
    assert_close(logits.double(), exact.logits(hidden.double()), rtol=1e-5, atol=1e-5)  # never rounded to bf16


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_states_and_head_of_different_dtypes_meet_in_that_of_the_states(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    hidden, weight = random_tensor(4, 3, seed=1, dtype=dtypes[0]), random_tensor(5, 3, seed=2, dtype=dtypes[1])
    exact = hidden.double() @ weight.to(dtypes[0]).double().T
    for logits in Head(weight).logits(hidden), Head(weight).write_logits(hidden, torch.empty(4, 5)):
        assert_close(logits, exact.float())


def test_many_weights_are_cast_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topd.algorithm.vocabulary.SLICE_ELEMENTS", 7)  # two rows of three
    hidden, weight, _, _, _ = models(torch.bfloat16)
    out = torch.empty(POSITIONS, VOCABULARY)
    hidden, weight = hidden.detach(), weight.detach()
    assert_close(Head(weight).write_logits(hidden, out), Head(weight).logits(hidden))


@shapes
@tile_sizes
def test_gathered_log_probs_and_their_gradients_are_those_of_the_whole_softmax(shape: Any, tile_elements: int) -> None:
    hidden, weight, bias, _, _ = models()
    head = Head(weight, bias, **shape)
    tokens = torch.randint(VOCABULARY, (POSITIONS, 4), generator=torch.Generator().manual_seed(0))
    tokens[:, 3] = tokens[:, 0]  # the same token wanted twice
    gathered = gathered_log_probs(hidden, head, tokens, tile_elements)
    logits = oracles.head_logits(hidden.detach(), weight.detach(), bias.detach(), **shape)
    assert_close(gathered.detach(), oracles.gathered_log_probs(logits, tokens))
    whole = head.logits(hidden).log_softmax(-1).gather(-1, tokens)
    upstream = random_tensor(POSITIONS, 4, seed=7)
    for ours, theirs in zip(
        torch.autograd.grad(gathered, (hidden, weight, bias), upstream),
        torch.autograd.grad(whole, (hidden, weight, bias), upstream),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_the_gradient_of_gathered_log_probs_is_the_finite_difference() -> None:
    hidden, weight, bias, _, _ = models()
    tokens = torch.arange(POSITIONS * 2).reshape(POSITIONS, 2) % VOCABULARY
    assert torch.autograd.gradcheck(
        lambda h, w, b: gathered_log_probs(h, Head(w, b, 1.1, 2.0, 0.7), tokens, 25), (hidden, weight, bias)
    )


def test_gathered_log_probs_of_bf16_states_are_float32() -> None:
    hidden, weight, _, _, _ = models(torch.bfloat16)
    tokens = torch.zeros(POSITIONS, 2, dtype=torch.long)
    gathered = gathered_log_probs(hidden, Head(weight), tokens, 25)
    exact = gathered_log_probs(hidden.detach().double(), Head(weight.detach().double()), tokens)
    assert gathered.dtype == torch.float32
    assert_close(gathered.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(gathered.sum(), hidden)[0].dtype == torch.bfloat16


def test_gathered_log_probs_of_no_position_or_no_token_are_empty() -> None:
    hidden, weight, _, _, _ = models()
    assert gathered_log_probs(hidden[:0], Head(weight), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3)
    assert gathered_log_probs(hidden, Head(weight), torch.zeros(POSITIONS, 0, dtype=torch.long)).shape == (POSITIONS, 0)
