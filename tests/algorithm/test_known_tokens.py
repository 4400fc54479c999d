"""Losses where the teacher is known on a few tokens: the KL after merging all others, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topd.algorithm import (
    Head,
    KnownTokens,
    LikelihoodTerms,
    distillation_loss,
    known_token_kl,
    known_token_loss,
    score_known_tokens,
    score_tokens,
)

POSITIONS, WIDTH, TEACHER_WIDTH, VOCABULARY = 6, 5, 7, 23


def models(seed: int = 0):
    """Hidden states and heads of both models, and sampled tokens."""
    torch.manual_seed(seed)
    student = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(POSITIONS, TEACHER_WIDTH, dtype=torch.float64)
    heads = [
        Head(torch.randn(VOCABULARY, width, dtype=torch.float64).requires_grad_(width == WIDTH))
        for width in (WIDTH, TEACHER_WIDTH)
    ]
    return student, heads[0], teacher, heads[1], torch.randint(VOCABULARY, (POSITIONS,))


def known_of(teacher, head, sampled, known: int) -> KnownTokens:
    """The sampled token, then the most likely others, as a server gives them."""
    log_probs = (teacher @ head.weight.T).log_softmax(-1)
    tokens = torch.zeros(POSITIONS, known + 1, dtype=torch.long)
    values = torch.full(tokens.shape, -torch.inf, dtype=torch.float64)
    for row in range(POSITIONS):
        kept = [int(sampled[row])]
        kept += [token for token in log_probs[row].topk(known).indices.tolist() if token != kept[0]]
        tokens[row, : len(kept)] = torch.tensor(kept)
        values[row, : len(kept)] = log_probs[row, kept].detach()
    return KnownTokens(tokens, values)


def merged_kl(student_log_probs, teacher_log_probs, kept: list[int], direction: str) -> float:
    """Naive: both distributions with the other tokens merged into one, then sum p (log p - log q)."""

    def merge(log_probs):
        probs = log_probs.exp()
        others = [token for token in range(VOCABULARY) if token not in kept]
        return torch.cat([probs[kept], probs[others].sum()[None]])

    p, q = merge(student_log_probs), merge(teacher_log_probs)
    if direction == "forward":
        p, q = q, p
    return float(sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)))


@given(st.integers(0, 10_000), st.integers(1, 10), st.sampled_from(["reverse", "forward"]))
def test_it_is_the_kl_after_merging_the_other_tokens_and_never_more_than_the_full_one(seed, known, direction):
    student, head, teacher, teacher_head, sampled = models(seed)
    told = known_of(teacher, teacher_head, sampled, known)
    scores = score_known_tokens(student, head, told, sampled, direction)
    full = score_tokens(student, head, teacher, teacher_head, sampled, direction)
    ours = (student @ head.weight.T).log_softmax(-1).detach()
    theirs = (teacher @ teacher_head.weight.T).log_softmax(-1)
    for row in range(POSITIONS):
        kept = told.tokens[row][told.log_probs[row] > -torch.inf].tolist()
        assert float(scores.kl[row]) == pytest.approx(merged_kl(ours[row], theirs[row], kept, direction), abs=1e-6)
    assert bool((scores.kl <= full.kl + 1e-6).all())
    assert torch.allclose(scores.teacher_nll, full.teacher_nll, atol=1e-5)
    assert torch.equal(scores.teacher_greedy, full.teacher_greedy)
    assert torch.equal(scores.student_greedy, full.student_greedy)


def test_where_all_tokens_are_known_it_is_the_full_loss_with_its_gradients():
    terms = LikelihoodTerms(torch.tensor([1, 1, 7]), torch.tensor([3, 4, 9]), torch.tensor([0.5, 0.1, 0.2]).double())
    weights = torch.rand(POSITIONS, dtype=torch.float64)
    gradients = []
    for known in (True, False):
        student, head, teacher, teacher_head, sampled = models()
        states = torch.cat([student, student[:2] * 2])
        if known:
            told = known_of(teacher, teacher_head, sampled, VOCABULARY)
            result = known_token_loss(states, head, told, weights, terms)
        else:
            result = distillation_loss(states, head, teacher, teacher_head, weights, terms)
        result.loss.backward()
        gradients.append((result, student.grad, head.weight.grad))
    (ours, *our_gradients), (full, *full_gradients) = gradients
    assert ours.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)
    assert torch.allclose(ours.token_loss, full.token_loss, atol=1e-6)
    assert torch.allclose(ours.nll, full.nll)
    assert ours.outside_top_k is not None
    assert float(ours.outside_top_k.max()) < 1e-6
    for mine, other in zip(our_gradients, full_gradients, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    student, head, teacher, teacher_head, sampled = models(3)
    told = known_of(teacher, teacher_head, sampled, 4)

    def loss(log_probs):
        return known_token_kl(log_probs, told).kl

    log_probs = (student @ head.weight.T).log_softmax(-1).detach().gather(-1, told.tokens).requires_grad_()
    assert torch.autograd.gradcheck(loss, (log_probs,))


def test_outside_top_k_is_the_students_probability_of_all_other_tokens():
    told = KnownTokens(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]]).log())
    result = known_token_kl(torch.tensor([[0.6, 0.1]]).log(), told)
    assert float(result.outside_top_k) == pytest.approx(0.3)
    by_hand = 0.6 * torch.tensor(0.6 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.25).log()
    assert float(result.kl) == pytest.approx(float(by_hand + 0.3 * torch.tensor(0.3 / 0.25).log()), rel=1e-6)
