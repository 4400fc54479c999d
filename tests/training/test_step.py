"""A step on models that are no more than its protocol: tables of the next token's logits by the last token."""

import pytest
import torch
from torch.testing import assert_close

from topd.algorithm import Head, distillation_loss, make_targets, score_tokens, token_cost, token_kl, trajectory_loss
from topd.near_future import Prefill, Rollouts, Windows
from topd.training.losses import LossInputs, guided_windows
from topd.training.method import Method
from topd.training.step import look_ahead, topd_loss

VOCABULARY, WINDOW, END, WEIGHT = 9, 5, 0, 0.3
EMBEDDINGS = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(4))


class Table:
    """A `Student` and a `Teacher` whose hidden state is the last token, one-hot."""

    eos_token_ids = (END,)
    cache_bytes_per_token = 0.0

    def __init__(self, seed: int):
        self.logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def head(self):
        return Head(self.logits.T)

    def prefill(self, rollouts, keep_prefix=True):
        return Prefill({"hidden": torch.eye(VOCABULARY)[before(rollouts)]})

    def scores(self, hidden, head, states, tokens, direction="reverse"):
        return score_tokens(hidden, head, states["hidden"], self.head(), tokens, direction)

    def loss(self, hidden, head, states, weights, terms=None, direction="reverse"):
        return distillation_loss(hidden, head, states["hidden"], self.head(), weights, terms, direction)

    def continue_(self, places, length, prefill=None, from_candidate=False):
        tokens = [torch.stack([prefix[-1] for prefix in places.prefixes()])]
        for step in range(length):
            greedy = self.logits[tokens[-1]].argmax(-1)
            tokens.append(places.tokens if from_candidate and step == 0 else greedy)
        window = torch.stack(tokens[1:], 1)
        mask = (window == END).cumsum(1) - (window == END).long() == 0
        return Windows(window * mask, mask)

    def window_costs(self, ours, theirs, places, hidden=False, cost="cosine"):
        return token_cost(ours.tokens, theirs.tokens, EMBEDDINGS, cost)

    def hidden_and_windows(self, rollouts, branches):
        last = before(rollouts)
        if branches is None:
            return torch.eye(VOCABULARY)[last], torch.empty(0)
        contexts = torch.cat([last.gather(1, branches.position)[:, :, None], branches.tokens[:, :, :-1]], 2)
        return torch.eye(VOCABULARY)[last], torch.eye(VOCABULARY)[contexts]

    def hidden_in_windows(self, rollouts, branches):
        return self.hidden_and_windows(rollouts, branches)[1]


def before(rollouts):
    """[rollout, position] the token before each token of the response."""
    return rollouts.input_ids[:, rollouts.prompt_ids.shape[1] - 1 : -1]


def three_rollouts():
    generator = torch.Generator().manual_seed(5)
    response = torch.randint(1, VOCABULARY, (3, 24), generator=generator)
    mask = (torch.arange(24) < torch.tensor([24, 14, 9])[:, None]).long()
    prompt = torch.randint(1, VOCABULARY, (3, 2), generator=generator)
    return Rollouts(prompt, torch.ones_like(prompt), response * mask, mask, mask)


@pytest.mark.parametrize("student_window", ["rollout", "candidate", "regenerated"])
def test_loss_and_gradient_are_those_of_the_definitions(student_window):
    student, teacher, rollouts = Table(1), Table(2), three_rollouts()
    student.logits.requires_grad_()
    method = Method(student_window=student_window, window_length=WINDOW, candidate_share=0.4, guidance_weight=WEIGHT,
                    fork_rule="batch_quantile", false_alarm_share=0.3)  # fmt: skip
    future = look_ahead(rollouts, student, teacher, method)
    forks, mask = future.chosen, rollouts.loss_mask.bool()
    assert 3 <= len(forks) < len(future.candidates)
    inputs = LossInputs(
        future.look.teacher_states, mask.sum(), None, guided_windows(forks, method), future.guided.sum()
    )
    found = topd_loss(rollouts, student, teacher, inputs, method).loss

    opd = token_kl(student.logits[before(rollouts)], teacher.logits[before(rollouts)])[mask].mean()
    ours, theirs = forks.ours, forks.theirs
    start = forks.places.at(before(rollouts))
    assert_close(theirs.tokens[:, 0], teacher.logits[start].argmax(-1))
    contexts = torch.cat([start[:, None], ours.tokens[:, :-1]], 1)
    targets = make_targets("transport", forks.transport.plan, ours.tokens, ours.mask, theirs.tokens, theirs.mask)
    log_probs = student.logits.log_softmax(-1)[contexts].gather(2, targets.tokens[:, None].expand(-1, WINDOW, -1))
    per_fork = trajectory_loss(log_probs, targets).sum(1) / targets.guided.sum(1)
    expected = opd + WEIGHT * per_fork.mean()
    assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, student.logits)[0] for loss in (found, expected)]
    assert_close(*gradients)
    assert gradients[0].abs().max() > 0.01
