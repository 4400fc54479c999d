"""Every kind of teacher answers everything that a step asks of a teacher, or says what to use instead."""

from dataclasses import replace

import pytest
import torch
from teachers.fake_server import serving
from tiny import TOKENIZER, tiny_model

from topd.algorithm import LikelihoodTerms
from topd.embedded.task import make_problems
from topd.errors import TOPDError
from topd.near_future import Branches, DistilledModel, LocalModel, Places, rollout_windows
from topd.near_future.sampling import sample_rollouts
from topd.teachers.openai_server import OpenAIServer
from topd.teachers.routed import RoutedTeacher
from topd.teachers.server_windows import connect
from topd.teachers.top_k import TopKTeacher

EOS = TOKENIZER.eos_token_id
LENGTH = 5


def local(model):
    return DistilledModel(model, LocalModel(model, TOKENIZER.pad_token_id, [EOS]))


STUDENT = local(tiny_model(9))


@pytest.fixture(scope="module")
def teachers():
    with serving(tiny_model(1, width=96), TOKENIZER) as fake:
        yield {
            "local": local(tiny_model(1, width=96)),
            "routed": RoutedTeacher([local(tiny_model(1, width=96)), local(tiny_model(2, width=32))]),
            "top-k": TopKTeacher(connect(OpenAIServer(fake.url), TOKENIZER, [EOS]), known=4),
        }


@pytest.fixture(scope="module")
def places():
    torch.manual_seed(0)
    prompts = [problem.prompt for problem in make_problems(4, 0, held_out=False)]
    rollouts = sample_rollouts(STUDENT.model, TOKENIZER, prompts, max_new_tokens=12)
    rollouts = replace(rollouts, teacher=torch.tensor([0, 1, 1, 0]))
    return Places(rollouts, torch.tensor([0, 1, 2, 2, 3]), torch.tensor([1, 0, 2, 4, 3]))


@pytest.mark.parametrize("kind", ["local", "routed", "top-k"])
def test_scores_loss_and_windows(teachers, places, kind):
    teacher, rollouts, mask = teachers[kind], places.rollouts, places.rollouts.loss_mask.bool()
    whole = teacher.prefill(rollouts)
    known = {name: values[mask] for name, values in whole.states.items()}
    hidden, head = STUDENT.hidden(rollouts)[mask], STUDENT.head()
    scores = teacher.scores(hidden, head, known, rollouts.response_ids[mask])
    weights = torch.rand(len(hidden))
    terms = LikelihoodTerms(torch.tensor([0, 2]), torch.tensor([3, 4]), torch.ones(2))
    loss = teacher.loss(hidden, head, known, weights, terms)
    torch.testing.assert_close(loss.token_loss, scores.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.loss, (weights * scores.kl).sum() + loss.nll.sum(), rtol=1e-4, atol=1e-4)
    assert (scores.kl >= -1e-6).all()
    greedy = torch.zeros_like(rollouts.response_ids).masked_scatter(mask, scores.teacher_greedy)
    over_prefix = teacher.continue_(places, LENGTH, replace(whole, greedy=greedy))
    fresh = teacher.continue_(places, LENGTH)
    assert torch.equal(over_prefix.tokens * over_prefix.mask, fresh.tokens * fresh.mask)
    assert teacher.cache_bytes_per_token >= 0


@pytest.mark.parametrize("hidden", [False, True])
def test_costs_by_the_embeddings_of_each_rollout_s_own_teacher(teachers, places, hidden):
    routed = teachers["routed"]
    windows = rollout_windows(places, LENGTH), routed.continue_(places, LENGTH)
    costs = routed.window_costs(*windows, places, hidden)
    for index, row in enumerate(places.rows.tolist()):
        one = torch.tensor([index])
        own = routed.teachers[int(places.rollouts.teacher[row])]
        alone = own.window_costs(windows[0][one], windows[1][one], places[one], hidden)
        torch.testing.assert_close(costs[index], alone[0].to(costs.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["local", "routed"])
def test_states_in_windows(teachers, places, kind):
    tokens = torch.full((len(places.rollouts), 1, LENGTH), 5)
    branches = Branches(torch.ones(len(tokens), 1, dtype=torch.long), tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert teachers[kind].hidden_in_windows(places.rollouts, branches).shape[:3] == tokens.shape


def test_a_server_names_the_option_to_use_instead(teachers, places):
    windows = rollout_windows(places, LENGTH)
    with pytest.raises(TOPDError, match="embedding=student"):
        teachers["top-k"].window_costs(windows, windows, places)
    with pytest.raises(TOPDError, match="guidance_context=student"):
        teachers["top-k"].hidden_in_windows(places.rollouts, None)
