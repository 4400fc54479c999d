"""The definition of the token loss, from logits: `token_kl`. Its tie to the NLL axis of Fig. 6."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import Head, score_tokens, token_kl

INF = math.inf
directions = pytest.mark.parametrize("direction", ["reverse", "forward"])
seeds = st.integers(0, 2**20)
sizes = st.integers(1, 5)


def random_logits(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_three_tokens_worked_by_hand() -> None:
    student = torch.tensor([1 / 2, 1 / 4, 1 / 4], dtype=torch.float64).log()
    teacher = torch.tensor([1 / 8, 1 / 8, 3 / 4], dtype=torch.float64).log()
    # KL(S || T) = 1/2 log 4 + 1/4 log 2 + 1/4 log(1/3) = 5/4 log 2 - 1/4 log 3 = 0.866434 - 0.274653
    assert_close(token_kl(student, teacher).item(), 0.591781, atol=1e-6, rtol=0)
    # KL(T || S) = 1/8 log(1/4) + 1/8 log(1/2) + 3/4 log 3 = -3/8 log 2 + 3/4 log 3 = -0.259930 + 0.823959
    assert_close(token_kl(student, teacher, "forward").item(), 0.564029, atol=1e-6, rtol=0)


def test_the_gradient_of_three_tokens_worked_by_hand() -> None:
    student = torch.tensor([1 / 2, 1 / 4, 1 / 4], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([1 / 8, 1 / 8, 3 / 4], dtype=torch.float64).log()
    (reverse,) = torch.autograd.grad(token_kl(student, teacher), student)
    # p_v (log p_v - log q_v - KL): 1/2 (1.386294 - 0.591781), 1/4 (0.693147 - 0.591781), 1/4 (-1.098612 - 0.591781)
    assert_close(reverse.tolist(), [0.397257, 0.025342, -0.422598], atol=1e-6, rtol=0)
    (forward,) = torch.autograd.grad(token_kl(student, teacher, "forward"), student)
    # p_v - q_v: 1/2 - 1/8, 1/4 - 1/8, 1/4 - 3/4
    assert_close(forward.tolist(), [0.375, 0.125, -0.5])


@directions
@given(batch=sizes, positions=sizes, vocabulary=st.integers(1, 7), seed=seeds)
def test_the_kl_is_that_of_the_oracle(direction: str, batch: int, positions: int, vocabulary: int, seed: int) -> None:
    student = random_logits(batch, positions, vocabulary, seed=seed)
    teacher = random_logits(batch, positions, vocabulary, seed=seed + 1)
    assert_close(token_kl(student, teacher, direction), oracles.token_kl(student, teacher, direction))


@directions
@given(seed=seeds, spread=st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_kl_is_never_negative_and_zero_only_between_equals(direction: str, seed: int, spread: float) -> None:
    student, teacher = random_logits(4, 6, seed=seed, spread=spread), random_logits(4, 6, seed=seed + 1, spread=spread)
    assert (token_kl(student, teacher, direction) > 0).all()
    shifted = student + torch.arange(4.0)[:, None]  # the same distributions
    assert_close(token_kl(student, shifted, direction), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@directions
def test_float32_agrees_with_float64(direction: str) -> None:
    student, teacher = random_logits(50, 300, seed=1), random_logits(50, 300, seed=2)
    single = token_kl(student.float(), teacher.float(), direction)
    assert single.dtype == torch.float32
    assert_close(single.double(), token_kl(student, teacher, direction), rtol=1e-5, atol=1e-6)


@directions
def test_bf16_logits_lose_nothing_but_their_own_rounding(direction: str) -> None:
    student = random_logits(6, 50, seed=1).bfloat16()
    teacher = (student + random_logits(6, 50, seed=2, spread=0.05)).bfloat16()
    exact = token_kl(student.double(), teacher.double(), direction)
    assert_close(token_kl(student, teacher, direction).double(), exact, rtol=1e-2, atol=1e-5)


@directions
def test_the_gradient_is_the_finite_difference(direction: str) -> None:
    student, teacher = random_logits(2, 3, 5, seed=3).requires_grad_(), random_logits(2, 3, 5, seed=4)
    assert torch.autograd.gradcheck(lambda s: token_kl(s, teacher, direction), student)


@directions
def test_the_gradient_is_the_central_difference_along_a_random_direction(direction: str) -> None:
    student, teacher, along = (random_logits(7, 40, seed=seed) for seed in (5, 6, 7))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(token_kl(student, teacher, direction).mean(), student)
    step = 1e-5
    with torch.no_grad():
        ahead = token_kl(student + step * along, teacher, direction).mean()
        behind = token_kl(student - step * along, teacher, direction).mean()
    assert_close((gradient * along).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


@directions
def test_a_masked_vocabulary_equals_the_smaller_one(direction: str) -> None:
    kept = [0, 2, 3]
    small_student, small_teacher = random_logits(4, 3, seed=8).requires_grad_(), random_logits(4, 3, seed=9)
    student, teacher = torch.full((2, 4, 5), -INF, dtype=torch.float64)
    student[:, kept], teacher[:, kept] = small_student.detach(), small_teacher
    student.requires_grad_()
    small, wide = token_kl(small_student, small_teacher, direction), token_kl(student, teacher, direction)
    assert_close(wide, small)
    (small_gradient,) = torch.autograd.grad(small.sum(), small_student)
    (wide_gradient,) = torch.autograd.grad(wide.sum(), student)
    assert_close(wide_gradient[:, kept], small_gradient)
    assert (wide_gradient[:, [1, 4]] == 0).all()


def test_a_token_only_the_student_lacks_makes_the_forward_kl_infinite_and_not_the_reverse_one() -> None:
    student, teacher = torch.tensor([0.0, 0.0, -INF]), torch.tensor([0.0, 0.0, 0.0])
    # KL(S || T) = 2 * 1/2 log((1/2) / (1/3)) = log 1.5
    assert_close(token_kl(student, teacher).item(), math.log(1.5))
    assert token_kl(student, teacher, "forward").item() == INF
    assert token_kl(teacher, student).item() == INF
    assert_close(token_kl(teacher, student, "forward").item(), math.log(1.5))


@directions
@given(seed=seeds, rollouts=st.integers(2, 5), positions=sizes)
def test_a_batch_equals_the_loop_and_follows_a_permutation(
    direction: str, seed: int, rollouts: int, positions: int
) -> None:
    student = random_logits(rollouts, positions, 4, seed=seed)
    teacher = random_logits(rollouts, positions, 4, seed=seed + 1)
    batch = token_kl(student, teacher, direction)
    loop = [token_kl(s, t, direction) for s, t in zip(student, teacher, strict=True)]
    assert_close(batch, torch.stack(loop))
    order = torch.randperm(rollouts, generator=torch.Generator().manual_seed(seed))
    assert_close(token_kl(student[order], teacher[order], direction), batch[order])


@directions
@given(seed=seeds)
def test_renaming_the_tokens_of_the_vocabulary_changes_nothing(direction: str, seed: int) -> None:
    student, teacher = random_logits(3, 6, seed=seed), random_logits(3, 6, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    renamed = token_kl(student[:, order], teacher[:, order], direction)
    assert_close(renamed, token_kl(student, teacher, direction))


def test_no_positions_give_no_values() -> None:
    empty = torch.zeros(2, 0, 5)
    assert token_kl(empty, empty).shape == (2, 0)


def test_the_nll_of_three_tokens_worked_by_hand() -> None:
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]], dtype=torch.float64).log() + 7.0
    same = Head(torch.eye(3, dtype=torch.float64))  # the hidden states are the logits
    scores = score_tokens(logits.flip(0), same, logits, same, torch.tensor([1, 2]))
    # -log(1/4) = 2 log 2; -log(3/4)
    assert_close(scores.teacher_nll.tolist(), [1.386294, 0.287682], atol=1e-6, rtol=0)
    # -log(1/8) = 3 log 2; -log(1/4)
    assert_close(scores.student_nll.tolist(), [2.079442, 1.386294], atol=1e-6, rtol=0)


def test_the_mean_nll_of_the_students_own_samples_minus_its_own_is_the_reverse_kl() -> None:
    """The axis of Fig. 6 (teacher NLL) is tied to the token loss: E_S[nll_T] - E_S[nll_S] = KL(S || T)."""
    student, teacher = random_logits(3, 5, seed=10), random_logits(3, 5, seed=11)
    same = Head(torch.eye(5, dtype=torch.float64))
    of_each_token = [score_tokens(student, same, teacher, same, torch.full((3,), v)) for v in range(5)]
    gap = torch.stack([scores.teacher_nll - scores.student_nll for scores in of_each_token], -1)
    assert_close(token_kl(student, teacher), (student.softmax(-1) * gap).sum(-1))
