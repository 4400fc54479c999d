"""The whole pure method in the order of the paper, on models that are tables of the next token's logits by the last."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import (
    Head,
    cap_weights,
    distillation_loss,
    exact_transport,
    false_alarm_threshold,
    gathered_log_probs,
    highest_loss,
    is_fork,
    make_targets,
    own_token_share,
    select_for_capping,
    token_cost,
    token_kl,
    trajectory_loss,
)
from topd.algorithm.guidance import TargetKind

VOCABULARY, WINDOW, END = 9, 5, 0
kinds = pytest.mark.parametrize("kind", ["transport", "same_index", "own"])


def table(seed: int) -> Tensor:
    """[last token, next token] logits; the end token is likely enough for some windows to end early."""
    logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, END] += 1.0
    return logits


STUDENT, TEACHER, OTHER_TEACHER = table(1), table(2), table(3)
EMBEDDINGS = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(4))


def rollouts(padding: int = 0) -> tuple[Tensor, Tensor]:
    """The last token before each position of three rollouts, and which positions count. The third rollout is empty."""
    last = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(12) < torch.tensor([12, 7, 0])[:, None]
    pad = torch.nn.functional.pad
    return pad(last, (0, padding), value=END), pad(mask, (0, padding))


LAST, MASK = rollouts()


def continue_greedily(model: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """WINDOW tokens from each context and which of them are there: up to the end token, which counts."""
    tokens = []
    for _ in range(WINDOW):
        last = model[last].argmax(-1)
        tokens.append(last)
    window = torch.stack(tokens, -1)
    ended_before = ((window == END).cumsum(-1) - (window == END).long()) > 0
    return window, ~ended_before


class NearFuture:
    """Candidates, both windows at each, the student's own contexts, transport and forks."""

    def __init__(self, student: Tensor, teacher: Tensor, last: Tensor = LAST, mask: Tensor = MASK) -> None:
        student = student.detach()
        self.candidates = highest_loss(token_kl(student[last], teacher[last]), mask, share=0.4)
        start = last[self.candidates]
        self.ours, self.ours_mask = continue_greedily(student, start)
        self.theirs, self.theirs_mask = continue_greedily(teacher, start)
        self.contexts = torch.cat([start[:, None], self.ours[:, :-1]], dim=1)
        cost = token_cost(self.ours, self.theirs, EMBEDDINGS)
        self.transport = exact_transport(cost, self.ours_mask, self.theirs_mask)
        self.fork = is_fork(self.transport.distance, false_alarm_threshold(self.transport.distance))


class Step:
    """L = L_OPD + weight * L_traj (section 3), L_traj as the mean over guided positions."""

    def __init__(
        self, student: Tensor, teacher: Tensor, weight: float, kind: TargetKind = "transport", padding: int = 0
    ) -> None:
        last, mask = rollouts(padding)
        self.opd = token_kl(student[last], teacher[last])[mask].mean()
        self.future = future = NearFuture(student, teacher, last, mask)
        fork = future.fork
        targets = make_targets(
            kind,
            future.transport.plan[fork],
            future.ours[fork],
            future.ours_mask[fork],
            future.theirs[fork],
            future.theirs_mask[fork],
        )
        wanted = targets.tokens[:, None, :].expand(-1, WINDOW, -1)
        # A table is a head: a one-hot hidden state of the last token picks its row of logits.
        hidden = torch.eye(VOCABULARY, dtype=student.dtype)[future.contexts[fork].flatten()]
        log_probs = gathered_log_probs(hidden, Head(student.T), wanted.flatten(0, 1), tile_elements=3 * VOCABULARY)
        guided = targets.guided
        self.positions = int(guided.sum())
        self.trajectory = trajectory_loss(log_probs.view(wanted.shape), targets).sum() / max(self.positions, 1)
        self.own_share = own_token_share(targets, future.ours[fork])[guided].mean()
        self.loss = self.opd + weight * self.trajectory


def gradient(
    student: Tensor, teacher: Tensor, weight: float, kind: TargetKind = "transport", padding: int = 0
) -> Tensor:
    parameters = student.clone().requires_grad_()
    return torch.autograd.grad(Step(parameters, teacher, weight, kind, padding).loss, parameters)[0]


def guidance_gradient(student: Tensor, teacher: Tensor, kind: TargetKind = "transport") -> Tensor:
    return gradient(student, teacher, 1.0, kind) - gradient(student, teacher, 0.0, kind)


def opd_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Plain on-policy distillation, written without the package."""
    parameters = student.clone().requires_grad_()
    p, q = parameters[LAST[MASK]].log_softmax(-1), teacher[LAST[MASK]].log_softmax(-1)
    return torch.autograd.grad((p.exp() * (p - q)).sum(-1).mean(), parameters)[0]


def test_the_toy_has_forks_false_alarms_and_windows_of_different_lengths() -> None:
    future = NearFuture(STUDENT, TEACHER)
    assert future.fork.sum() >= 3
    assert (~future.fork).any()
    assert future.transport.converged.all()
    assert (future.ours_mask.sum(-1) != future.theirs_mask.sum(-1)).any()
    assert Step(STUDENT, TEACHER, 1.0).own_share < 0.5  # most guidance is not what the student says already


@kinds
def test_guidance_of_weight_zero_is_opd(kind: str) -> None:
    assert_close(gradient(STUDENT, TEACHER, 0.0, kind), opd_gradient(STUDENT, TEACHER), atol=1e-14, rtol=0)
    assert (gradient(STUDENT, TEACHER, 1.0, kind) - opd_gradient(STUDENT, TEACHER)).abs().max() > 0.01


@kinds
def test_guidance_grows_in_proportion_to_its_weight(kind: str) -> None:
    none, half, full = (gradient(STUDENT, TEACHER, weight, kind) for weight in (0.0, 0.5, 1.0))
    assert_close(full - none, 2 * (half - none))


@kinds
def test_padding_the_rollouts_changes_nothing(kind: str) -> None:
    assert_close(gradient(STUDENT, TEACHER, 1.0, kind, padding=4), gradient(STUDENT, TEACHER, 1.0, kind))


def test_a_student_that_equals_its_teacher_has_no_fork_no_loss_and_no_gradient() -> None:
    whole = Step(TEACHER, TEACHER, 1.0)
    assert whole.positions == 0
    assert whole.trajectory == 0
    assert (whole.future.transport.distance == 0).all()
    assert_close(gradient(TEACHER, TEACHER, 1.0), torch.zeros_like(TEACHER), atol=1e-12, rtol=0)


def test_opd_moves_the_student_towards_the_teacher() -> None:
    visited = LAST[MASK].unique()
    downhill = -opd_gradient(STUDENT, TEACHER)
    assert ((downhill * (TEACHER - STUDENT)).sum(-1)[visited] > 0).all()  # in every context that the rollouts visit
    for direction in ("reverse", "forward"):
        before, after = (token_kl(m, TEACHER, direction)[visited].mean() for m in (STUDENT, STUDENT + downhill))
        assert after < before


def test_a_few_steps_bring_the_losses_down_and_the_near_futures_together() -> None:
    student = STUDENT.clone()
    for _ in range(60):
        student = student - 2.0 * gradient(student, TEACHER, 0.3)
    first, last = Step(STUDENT, TEACHER, 0.3), Step(student, TEACHER, 0.3)
    assert last.opd < 0.5 * first.opd
    assert last.future.transport.distance.mean() < 0.5 * first.future.transport.distance.mean()


def test_guidance_raises_the_probability_of_the_teachers_matched_tokens_in_the_students_contexts() -> None:
    future = NearFuture(STUDENT, TEACHER)
    matched = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)  # mass on each (context, teacher token)
    for window in future.fork.nonzero().flatten().tolist():
        for i, j in future.transport.plan[window].nonzero().tolist():
            mass = future.transport.plan[window, i, j].double() / future.transport.plan[window, i].sum()
            matched[future.contexts[window, i], future.theirs[window, j]] += mass
    guidance = guidance_gradient(STUDENT, TEACHER)
    expected = (matched.sum(-1, keepdim=True) * STUDENT.softmax(-1) - matched) / matched.sum()
    assert_close(guidance, expected, atol=1e-6, rtol=0)  # p - y at each guided position, averaged
    change = (STUDENT - 0.1 * guidance).log_softmax(-1) - STUDENT.log_softmax(-1)
    assert (change * matched).sum() > 0


def test_another_teacher_gives_another_gradient() -> None:
    for weight in (0.0, 1.0):
        one, other = gradient(STUDENT, TEACHER, weight), gradient(STUDENT, OTHER_TEACHER, weight)
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.9
    one, other = (guidance_gradient(STUDENT, teacher) for teacher in (TEACHER, OTHER_TEACHER))
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.9


def test_own_token_targets_only_sharpen() -> None:
    guidance = guidance_gradient(STUDENT, TEACHER, "own")
    touched = guidance.abs().sum(-1) > 0
    after = STUDENT - 0.5 * guidance

    def entropy(model: Tensor) -> Tensor:
        return -(model.softmax(-1) * model.log_softmax(-1)).sum(-1)

    assert touched.any()
    assert (entropy(after)[touched] < entropy(STUDENT)[touched]).all()
    assert torch.equal(after.argmax(-1), STUDENT.argmax(-1))  # it says what it said, more surely
    # at each guided context the student's own token gains, every other one loses
    own = torch.nn.functional.one_hot(STUDENT.argmax(-1), VOCABULARY).bool()
    assert (guidance[own & touched[:, None]] < 0).all()
    assert (guidance[~own & touched[:, None]] > 0).all()
    assert Step(STUDENT, TEACHER, 1.0, "own").own_share == 1


def test_the_three_kinds_of_target_differ_on_the_same_forks() -> None:
    kinds_of_target: list[TargetKind] = ["transport", "same_index", "own"]
    guidance = [guidance_gradient(STUDENT, TEACHER, kind) for kind in kinds_of_target]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (guidance[first] - guidance[second]).abs().max() > 0.01
    assert Step(STUDENT, TEACHER, 1.0, "same_index").own_share < Step(STUDENT, TEACHER, 1.0, "own").own_share


def test_opd_from_hidden_states_is_opd_from_logits() -> None:
    parameters = STUDENT.clone().requires_grad_()
    states = torch.eye(VOCABULARY, dtype=torch.float64)[LAST[MASK]]
    mean = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    heads = Head(parameters.T), Head(TEACHER.T)
    tiled_loss = distillation_loss(states, heads[0], states, heads[1], mean, tile_elements=4 * VOCABULARY).loss
    (tiled,) = torch.autograd.grad(tiled_loss, parameters)
    assert_close(tiled, opd_gradient(STUDENT, TEACHER))


def test_capping_false_alarms_takes_loss_from_them_alone() -> None:
    future, token_loss = NearFuture(STUDENT, TEACHER), token_kl(STUDENT[LAST], TEACHER[LAST])
    capped = torch.zeros_like(MASK)
    capped[future.candidates] = select_for_capping(future.transport.distance)
    weighted = cap_weights(token_loss, MASK, capped) * token_loss
    assert torch.equal(capped[future.candidates], ~future.fork)
    assert capped.any()
    assert (weighted[capped] < token_loss[capped]).all()
    assert torch.equal(weighted[~capped], token_loss[~capped])
