"""Targets, the trajectory loss and the share of own tokens."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from topd.algorithm import (
    Head,
    Targets,
    distillation_loss,
    exact_transport,
    likelihood_terms,
    make_targets,
    negative_entropy,
    own_token_share,
    position_weights,
    rescale_rows,
    token_kl,
    trajectory_loss,
)

KINDS = ["transport", "same_index", "own"]
kinds = pytest.mark.parametrize("kind", KINDS)
seeds = st.integers(0, 2**20)
VOCABULARY = 5  # fewer tokens than places, so that windows repeat tokens

Forks = dict[str, Tensor]


def prefix_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def random_forks(student_lengths: list[int], teacher_lengths: list[int], seed: int, padding: int = 0) -> Forks:
    """Windows of random tokens with an exact plan between them; every size is its own."""
    generator = torch.Generator().manual_seed(seed)
    count, rows, columns = len(student_lengths), max(student_lengths) + padding, max(teacher_lengths) + padding
    masks = prefix_mask(student_lengths, rows), prefix_mask(teacher_lengths, columns)
    cost = torch.rand(count, rows, columns, generator=generator, dtype=torch.float64)
    return {
        "plan": exact_transport(cost, *masks).plan,
        "student_tokens": torch.randint(VOCABULARY, (count, rows), generator=generator),
        "student_mask": masks[0],
        "teacher_tokens": torch.randint(VOCABULARY, (count, columns), generator=generator),
        "teacher_mask": masks[1],
    }


@st.composite
def forks(draw: st.DrawFn, fewest: int = 1) -> Forks:
    size, lengths = draw(st.integers(fewest, 3)), st.integers(0, 5)
    return random_forks(
        [draw(lengths) for _ in range(size)], [draw(lengths) for _ in range(size)], draw(seeds), draw(st.integers(0, 2))
    )


def random_logits(forks: Forks, seed: int = 0) -> Tensor:
    """[fork, student_position, vocabulary]"""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*forks["student_tokens"].shape, VOCABULARY, generator=generator, dtype=torch.float64)


def loss_of(targets: Targets, logits: Tensor) -> Tensor:
    """The trajectory loss from logits over the vocabulary."""
    tokens = targets.tokens[:, None, :].expand(-1, logits.shape[1], -1)
    return trajectory_loss(logits.log_softmax(-1).gather(-1, tokens), targets)


def select(forks: Forks, index: Tensor) -> Forks:
    return {name: value[index] for name, value in forks.items()}


def test_three_tokens_worked_by_hand() -> None:
    # One student position, three teacher places holding tokens 2, 0, 2: y = (1/4, 0, 3/4), since 2 has two copies.
    targets = Targets(torch.tensor([[[1 / 2, 1 / 4, 1 / 4]]], dtype=torch.float64), torch.tensor([[2, 0, 2]]))
    logits = torch.tensor([[[1 / 2, 1 / 4, 1 / 4]]], dtype=torch.float64).log()
    # KL(y || p) = 1/4 log((1/4) / (1/2)) + 3/4 log((3/4) / (1/4)) = -1/4 log 2 + 3/4 log 3 = -0.173287 + 0.823959
    assert_close(loss_of(targets, logits).tolist(), [[0.650672]], atol=1e-6, rtol=0)


def test_the_merged_entropy_makes_the_loss_zero_where_the_student_already_agrees() -> None:
    # y = (1/4, 0, 3/4) again, and the student says the same: without merging, the copies would leave -0.477 nats.
    targets = Targets(torch.tensor([[[1 / 2, 1 / 4, 1 / 4]]], dtype=torch.float64), torch.tensor([[2, 0, 2]]))
    agreeing = torch.tensor([[[1 / 4, 0, 3 / 4]]], dtype=torch.float64).log()
    assert_close(loss_of(targets, agreeing).tolist(), [[0.0]], atol=1e-12, rtol=0)


def test_targets_of_two_student_and_three_teacher_tokens_worked_by_hand() -> None:
    both, all_three = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    plan = torch.tensor([[[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]]])  # rows hold 1/2, columns 1/3
    windows = plan, torch.tensor([[7, 8]]), both, torch.tensor([[8, 7, 8]]), all_three
    transport = make_targets("transport", *windows)
    assert_close(transport.weight, torch.tensor([[[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]]))
    assert transport.tokens.tolist() == [[8, 7, 8]]
    assert transport.guided.tolist() == [[True, True]]
    # the student's own 7 has 1/3 of the first target, its own 8 has 2/3 of the second
    assert_close(own_token_share(transport, windows[1]), torch.tensor([[1 / 3, 2 / 3]]))
    same_index = make_targets("same_index", *windows)
    assert same_index.weight.tolist() == [[[1, 0, 0], [0, 1, 0]]]
    assert same_index.tokens.tolist() == [[8, 7, 8]]
    assert own_token_share(same_index, windows[1]).tolist() == [[0, 0]]
    own = make_targets("own", *windows)
    assert own.weight.tolist() == [[[1, 0], [0, 1]]]
    assert own.tokens.tolist() == [[7, 8]]
    assert own_token_share(own, windows[1]).tolist() == [[1, 1]]


def test_a_square_plan_is_read_by_rows_of_the_student() -> None:
    cost = torch.tensor([[[2.0, 1, 5], [3, 4, 1], [1, 6, 7]]])  # student 0 to teacher 1, 1 to 2, 2 to 0
    everything = torch.ones(1, 3, dtype=torch.bool)
    plan = exact_transport(cost, everything, everything).plan
    targets = make_targets(
        "transport", plan, torch.tensor([[0, 1, 2]]), everything, torch.tensor([[10, 11, 12]]), everything
    )
    assert [targets.tokens[0, row.argmax()].item() for row in targets.weight[0]] == [11, 12, 10]


@kinds
@given(forks=forks())
def test_each_guided_target_is_a_distribution_and_no_other_position_has_one(kind: str, forks: Forks) -> None:
    targets = make_targets(kind, **forks)
    student, teacher = (forks[f"{who}_mask"].sum(-1) for who in ("student", "teacher"))
    guided = {
        "transport": torch.where(teacher > 0, student, 0),  # an empty window has no plan
        "same_index": torch.minimum(student, teacher),
        "own": student,
    }[kind]
    assert targets.guided.tolist() == prefix_mask(guided.tolist(), forks["student_mask"].shape[1]).tolist()
    assert_close(targets.weight.sum(-1), targets.guided.double())
    assert (targets.weight >= 0).all()
    expected_tokens = forks["student_tokens" if kind == "own" else "teacher_tokens"]
    assert torch.equal(targets.tokens, expected_tokens)


@given(forks=forks())
def test_same_index_and_own_targets_are_single_tokens_in_order(forks: Forks) -> None:
    for kind in ("same_index", "own"):
        targets = make_targets(kind, **forks)
        for fork, position in targets.guided.nonzero().tolist():
            assert targets.weight[fork, position].nonzero().flatten().tolist() == [position]


@given(forks=forks())
def test_rescaled_rows_keep_their_proportions(forks: Forks) -> None:
    plan = forks["plan"]
    rescaled = rescale_rows(plan)
    assert_close(rescaled * plan.sum(-1, keepdim=True), plan)
    assert_close(rescale_rows(7.5 * plan), rescaled)
    assert (rescaled[plan.sum(-1) == 0] == 0).all()


@kinds
@given(forks=forks(), seed=seeds)
def test_loss_and_own_share_are_those_of_one_hot_targets_over_the_vocabulary(
    kind: str, forks: Forks, seed: int
) -> None:
    targets, logits = make_targets(kind, **forks), random_logits(forks, seed)
    loss, share = loss_of(targets, logits), own_token_share(targets, forks["student_tokens"])
    for fork in range(len(loss)):
        if targets.weight[fork].numel():
            weight, tokens = targets.weight[fork], targets.tokens[fork]
            assert_close(loss[fork].tolist(), oracles.trajectory_loss(weight, tokens, logits[fork]))
            assert_close(share[fork].tolist(), oracles.own_token_share(weight, tokens, forks["student_tokens"][fork]))


@kinds
@given(forks=forks(), seed=seeds)
def test_the_loss_is_never_negative_and_zero_where_nothing_is_guided(kind: str, forks: Forks, seed: int) -> None:
    targets = make_targets(kind, **forks)
    loss = loss_of(targets, random_logits(forks, seed))
    assert (loss[targets.guided] > 0).all()
    assert (loss[~targets.guided] == 0).all()


@kinds
def test_the_gradient_of_the_logits_is_the_students_distribution_minus_the_target(kind: str) -> None:
    forks = random_forks([4, 2, 0], [3, 5, 2], seed=1)
    targets, logits = make_targets(kind, **forks), random_logits(forks).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(targets, logits).sum(), logits)
    for fork in range(3):
        one_hot = oracles.vocabulary_targets(targets.weight[fork], targets.tokens[fork], VOCABULARY)
        expected = logits.detach()[fork].softmax(-1) - torch.tensor(one_hot, dtype=torch.float64)
        assert_close(gradient[fork], expected * targets.guided[fork][:, None])


@kinds
def test_the_gradient_is_the_finite_difference(kind: str) -> None:
    forks = random_forks([3, 1], [2, 4], seed=2, padding=1)
    targets, logits = make_targets(kind, **forks), random_logits(forks).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(targets, z), logits)


@kinds
def test_the_gradient_is_the_central_difference_along_a_random_direction(kind: str) -> None:
    forks = random_forks([5, 3, 4], [2, 4, 6], seed=3)
    targets, logits, along = (
        make_targets(kind, **forks),
        random_logits(forks, 1).requires_grad_(),
        random_logits(forks, 2),
    )
    (gradient,) = torch.autograd.grad(loss_of(targets, logits).mean(), logits)
    ahead, behind = (loss_of(targets, logits.detach() + step * along).mean() for step in (1e-5, -1e-5))
    assert_close((gradient * along).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


@kinds
@given(forks=forks(fewest=2), seed=seeds)
def test_a_batch_equals_the_loop_and_follows_a_permutation(kind: str, forks: Forks, seed: int) -> None:
    logits = random_logits(forks, seed)
    batch = loss_of(make_targets(kind, **forks), logits)
    every = torch.arange(len(logits))
    loop = [loss_of(make_targets(kind, **select(forks, index)), logits[index]) for index in every.split(1)]
    assert_close(batch, torch.cat(loop))
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    assert_close(loss_of(make_targets(kind, **select(forks, order)), logits[order]), batch[order])


@given(forks=forks(), seed=seeds)
def test_the_order_of_the_teachers_places_does_not_matter_to_transport_targets(forks: Forks, seed: int) -> None:
    logits, targets = random_logits(forks, seed), make_targets("transport", **forks)
    order = torch.randperm(targets.tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    shuffled = Targets(targets.weight[:, :, order], targets.tokens[:, order])
    assert_close(loss_of(shuffled, logits), loss_of(targets, logits))


@kinds
@given(forks=forks(), rows=st.integers(0, 3), columns=st.integers(0, 3), token=st.integers(0, VOCABULARY - 1))
def test_padding_changes_nothing_whatever_token_stands_in_it(
    kind: str, forks: Forks, rows: int, columns: int, token: int
) -> None:
    pad = torch.nn.functional.pad
    wide = {
        "plan": pad(forks["plan"], (0, columns, 0, rows)),
        "student_tokens": pad(forks["student_tokens"], (0, rows), value=token),
        "student_mask": pad(forks["student_mask"], (0, rows)),
        "teacher_tokens": pad(forks["teacher_tokens"], (0, columns), value=token),
        "teacher_mask": pad(forks["teacher_mask"], (0, columns)),
    }
    logits = random_logits(forks)
    before, after = make_targets(kind, **forks), make_targets(kind, **wide)
    assert after.guided.tolist() == pad(before.guided, (0, rows)).tolist()
    assert_close(loss_of(after, pad(logits, (0, 0, 0, rows), value=3.0)), pad(loss_of(before, logits), (0, rows)))
    share = own_token_share(before, forks["student_tokens"])
    assert_close(own_token_share(after, wide["student_tokens"]), pad(share, (0, rows)))


def test_an_impossible_token_matters_only_where_it_is_a_target() -> None:
    weight = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    log_probs = torch.tensor([[[-0.5, -math.inf], [-0.5, -math.inf]]], requires_grad=True)
    loss = trajectory_loss(log_probs, Targets(weight, torch.tensor([[3, 4]])))
    assert loss.tolist() == [[0.5, math.inf]]
    (gradient,) = torch.autograd.grad(loss[0, 0], log_probs)
    assert gradient.tolist() == [[[-1.0, 0.0], [0.0, 0.0]]]


def test_a_bf16_plan_and_float64_targets_keep_the_precision_of_the_log_probabilities() -> None:
    forks = random_forks([4, 3], [4, 5], seed=4)
    exact, logits = make_targets("transport", **forks), random_logits(forks)
    rounded = make_targets("transport", **(forks | {"plan": forks["plan"].bfloat16()}))
    assert rounded.weight.dtype == torch.bfloat16
    single = loss_of(rounded, logits.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), loss_of(exact, logits), atol=0.02, rtol=0)
    assert_close(loss_of(exact, logits.float()).double(), loss_of(exact, logits), atol=1e-5, rtol=1e-5)


@kinds
@pytest.mark.parametrize(("count", "rows", "columns"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_forks_and_empty_windows_give_no_loss(kind: str, count: int, rows: int, columns: int) -> None:
    forks = {
        "plan": torch.zeros(count, rows, columns),
        "student_tokens": torch.zeros(count, rows, dtype=torch.long),
        "student_mask": torch.ones(count, rows, dtype=torch.bool),
        "teacher_tokens": torch.zeros(count, columns, dtype=torch.long),
        "teacher_mask": torch.ones(count, columns, dtype=torch.bool),
    }
    targets = make_targets(kind, **forks)
    loss = loss_of(targets, torch.zeros(count, rows, VOCABULARY))
    assert loss.shape == targets.guided.shape == (count, rows)
    assert own_token_share(targets, forks["student_tokens"]).shape == (count, rows)
    assert targets.guided.any() == (kind == "own" and count > 0 and rows > 0)


def test_position_weights_worked_by_hand() -> None:
    # One target token per row; the first fork guides two positions, the second one, the third none.
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[:, :, None]
    targets = Targets(weight, torch.zeros(3, 1, dtype=torch.long))
    assert position_weights(targets, "mean").tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]
    for reduction in ("sum", "per_token"):
        assert position_weights(targets, reduction).tolist() == weight.squeeze(-1).tolist()


@kinds
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_a_training_step_is_the_definition_with_its_gradients(kind: str, reduction: str) -> None:
    """Training computes L_OPD + lambda L_traj in one pass, from terms; it equals `token_kl` and `trajectory_loss`."""
    forks = random_forks([4, 2, 3], [3, 5, 4], seed=6, padding=1)
    targets = make_targets(kind, **forks)
    if kind == "transport":  # soft targets: rows over several tokens, as of an entropic plan, some tokens repeated
        soft = rescale_rows(forks["plan"] + 0.1 * forks["plan"].sum(-1, keepdim=True) * forks["teacher_mask"][:, None])
        targets = Targets(soft, targets.tokens)
        assert (soft > 0).sum(-1).max() > 1
    draw = torch.Generator().manual_seed(7)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((9, 3), (VOCABULARY, 3), (6, 4), (5, 4))
    )
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    head, teacher = Head(weight, softcap=3.0), Head(teacher_weight)
    row = torch.randint(9, targets.guided.shape, generator=draw)  # windows share rows with each other and with L_OPD
    opd_weights = torch.rand(6, generator=draw, dtype=torch.float64)
    scale = 0.03 * position_weights(targets, reduction) / len(row)

    terms = likelihood_terms(targets, row, scale)
    one_pass = distillation_loss(hidden, head, teacher_hidden, teacher, opd_weights, terms, tile_elements=20)
    fast = one_pass.loss + (scale * negative_entropy(targets)).sum()

    logits = head.logits(hidden)
    opd = (opd_weights * token_kl(logits[:6], teacher.logits(teacher_hidden))).sum()
    definition = opd + (scale * loss_of(targets, logits[row])).sum()
    assert_close(fast, definition)
    for ours, theirs in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(definition, inputs), strict=True):
        assert_close(ours, theirs)
