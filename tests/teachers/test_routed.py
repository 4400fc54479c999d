"""Several teachers as one: each rollout gets exactly what its own teacher alone would give it."""

from dataclasses import replace

import pytest
import torch
from tiny import TOKENIZER, tiny_model

from topd.embedded.task import make_problems
from topd.errors import TOPDError
from topd.near_future import DistilledModel, LocalModel, Places
from topd.near_future.sampling import sample_rollouts
from topd.teachers.routed import RoutedTeacher

WIDTHS = (64, 96, 32)
OF_ROLLOUT = torch.tensor([2, 0, 1, 0, 2, 2, 0])
LENGTH = 6


@pytest.fixture(scope="module", params=[True, False], ids=["one prefix", "fresh prefixes"])
def teachers(request):
    def seen(model):
        source = LocalModel(model, TOKENIZER.pad_token_id, [TOKENIZER.eos_token_id])
        return DistilledModel(model, source, share_prefix=request.param)

    return [seen(tiny_model(seed, width)) for seed, width in enumerate(WIDTHS)]


@pytest.fixture(scope="module")
def rollouts():
    torch.manual_seed(0)
    prompts = [problem.prompt for problem in make_problems(len(OF_ROLLOUT), 0, held_out=False)]
    sampled = sample_rollouts(tiny_model(9), TOKENIZER, prompts, max_new_tokens=14)
    return type(sampled)(**{**vars(sampled), "teacher": OF_ROLLOUT})


def test_logits_are_those_of_the_rollout_s_own_teacher(teachers, rollouts):
    routed = RoutedTeacher(teachers)
    hidden = routed.prefill(rollouts).hidden
    assert hidden.shape[-1] == sum(WIDTHS)
    assert torch.equal(hidden, routed.prefill(rollouts).hidden)
    logits = routed.head().logits(hidden)
    for row, number in enumerate(OF_ROLLOUT.tolist()):
        own = teachers[number]
        expected = own.head().logits(own.hidden(rollouts)[row])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_windows_are_those_of_the_rollout_s_own_teacher(teachers, rollouts):
    routed = RoutedTeacher(teachers)
    rows, positions = torch.tensor([[0, 1], [0, 5], [1, 3], [2, 0], [2, 7], [5, 2], [6, 4]]).T
    reading = routed.prefill(rollouts)
    greedy = routed.head().logits(reading.hidden).argmax(-1)
    windows = routed.continue_(Places(rollouts, rows, positions), LENGTH, replace(reading, greedy=greedy))
    for place, (row, position) in enumerate(zip(rows, positions, strict=True)):
        own = teachers[int(OF_ROLLOUT[row])]
        alone = own.prefill(rollouts)
        own_greedy = own.head().logits(alone.hidden).argmax(-1)
        expected = own.continue_(Places(rollouts, row[None], position[None]), LENGTH, replace(alone, greedy=own_greedy))
        assert torch.equal(windows.mask[place], expected.mask[0])
        assert torch.equal(windows.tokens[place] * windows.mask[place], expected.tokens[0] * expected.mask[0])


def test_a_part_of_the_rollouts_keeps_its_teachers(teachers, rollouts):
    routed = RoutedTeacher(teachers)
    part = slice(1, 4)  # teachers 0 and 1 only
    whole = routed.prefill(rollouts).hidden
    torch.testing.assert_close(routed.prefill(rollouts[part]).hidden, whole[part], rtol=1e-4, atol=1e-4)


def test_a_float32_teacher_s_states_are_not_rounded_next_to_a_bfloat16_one(rollouts):
    models = [tiny_model(0).bfloat16(), tiny_model(1, 96), tiny_model(2, 32).bfloat16()]
    source = LocalModel(models[0], TOKENIZER.pad_token_id, [TOKENIZER.eos_token_id])
    hidden = RoutedTeacher([DistilledModel(model, source) for model in models]).prefill(rollouts).hidden
    exact = DistilledModel(models[1], source).hidden(rollouts[2:3])
    torch.testing.assert_close(hidden[2:3, :, 64:160], exact, rtol=1e-5, atol=1e-5)


def test_heads_that_treat_logits_otherwise_are_refused(teachers):
    other = tiny_model(1)
    other.config.final_logit_softcapping = 30.0
    seen = DistilledModel(other, LocalModel(other, 0, [1]))
    with pytest.raises(TOPDError, match="alike"):
        RoutedTeacher([teachers[0], seen])
    larger = tiny_model(1)
    larger.resize_token_embeddings(len(TOKENIZER) + 8)
    with pytest.raises(TOPDError, match="same vocabulary"):
        RoutedTeacher([teachers[0], DistilledModel(larger, LocalModel(larger, 0, [1]))])
