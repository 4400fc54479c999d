"""What the student computes while sampling is what a scoring pass would compute."""

import pytest
import torch
from special_models import special_model
from test_shared_prefix import EOS, known, model_of
from torch import nn

from topd.near_future import DistilledModel, LocalModel, Places, Rollouts
from topd.near_future.sampling import SamplingStates, has_dropout


def sampled(model, length=12, seed=0, eos=EOS):
    """Two prompts of different lengths, responses sampled by one call of `generate`; one may end early."""
    torch.manual_seed(seed)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.randint(3, 47, (2, 5)) * mask
    states = SamplingStates()
    with states.keeping(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=length, eos_token_id=eos, pad_token_id=0
        )
    response = output[:, 5:]
    ended = (response == EOS).cumsum(1) - (response == EOS).long() > 0 if eos else torch.zeros_like(response) > 0
    response_mask = (~ended).long()
    return Rollouts(ids, mask, response * response_mask, response_mask, response_mask), states


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_states_and_windows_are_those_of_a_scoring_pass(kind):
    model = model_of(kind)
    for seed in range(3):
        rollouts, states = sampled(model, seed=seed)
        pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
        kept, scored = states.prefill(rollouts, keep_prefix=True), pair.prefill(rollouts)
        mask = rollouts.response_mask.bool()
        assert torch.allclose(kept.hidden[mask], scored.hidden[mask], atol=1e-4)
        rows, positions = mask.nonzero(as_tuple=True)
        windows = [
            pair.continue_(Places(rollouts, rows, positions), 6, known(model, reading)) for reading in (kept, scored)
        ]
        assert torch.equal(windows[0].tokens, windows[1].tokens)
        assert torch.equal(windows[0].mask, windows[1].mask)


@pytest.mark.parametrize("kind", ["deepseek-v3", "qwen3.5", "gemma3"])
def test_a_cache_that_does_not_hold_what_attention_gets_is_not_a_prefix(kind):
    """Latents, recurrent states, and sliding windows that have dropped tokens: the rollouts are read once more."""
    model = special_model(kind)
    rollouts, states = sampled(model)
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    assert pair.sampled(rollouts, states, keep_prefix=True) is None
    assert pair.sampled(rollouts, states, keep_prefix=False).prefix is None


def test_without_windows_of_its_own_the_student_keeps_no_prefix():
    rollouts, states = sampled(model_of("llama"))
    assert states.prefill(rollouts, keep_prefix=False).prefix is None


def test_a_response_padded_further_is_fine_and_other_rollouts_are_refused():
    rollouts, states = sampled(model_of("llama"), eos=None)
    wider = Rollouts(
        rollouts.prompt_ids, rollouts.prompt_mask,
        *(nn.functional.pad(x, (0, 4)) for x in (rollouts.response_ids, rollouts.response_mask, rollouts.loss_mask)),
    )  # fmt: skip
    assert states.prefill(wider, keep_prefix=True).hidden.shape[1] == 16
    assert states.prefill(rollouts[:1], keep_prefix=False) is None
    longer = torch.ones(2, 30, dtype=torch.long)
    assert states.prefill(Rollouts(rollouts.prompt_ids, rollouts.prompt_mask, longer, longer, longer), False) is None


def test_two_calls_are_refused():
    model = model_of("llama")
    rollouts, states = sampled(model)
    with states.keeping(model):
        model.generate(input_ids=rollouts.prompt_ids, max_new_tokens=2, pad_token_id=0)
    assert states.prefill(rollouts, keep_prefix=False) is None


def test_dropout_is_found():
    model = model_of("llama")
    assert not has_dropout(model)
    model.model.layers[0].mlp.drop = nn.Dropout(0.1)
    assert has_dropout(model)
