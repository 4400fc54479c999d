"""Responses from a model in this process: seeded one by one, sampled from the right law, cut where it is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TOKENIZER, tiny_model
from tiny_architectures import tiny
from transformers import TopPLogitsWarper

from topd.embedded.task import make_problems
from topd.errors import ContextError, TOPDError
from topd.evaluation.engines import LocalEngine, OwnRandomNumbers, Request, Response, Sampling, ids_of, nucleus

PROBLEMS = make_problems(12, 3, held_out=True)
REQUESTS = [Request(number, problem.prompt) for number, problem in enumerate(PROBLEMS)]
SAMPLING = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=24)


def responses(engine: LocalEngine, requests: list[Request], sampling: Sampling) -> dict[int, Response]:
    return {number: response for batch in engine.respond(requests, sampling) for number, response in batch}


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(tiny_model(0, scale=1.5).eval(), TOKENIZER, together=12)


def test_a_response_does_not_depend_on_what_it_is_batched_with(engine: LocalEngine) -> None:
    together = responses(engine, REQUESTS, SAMPLING)
    alone = responses(LocalEngine(engine.model, TOKENIZER, together=1), REQUESTS[::-1], SAMPLING)
    assert together == alone
    assert len({response.text for response in together.values()}) > 6


def test_rows_that_have_ended_leave_where_the_model_allows_it() -> None:
    engine = LocalEngine(tiny_model(0, scale=1.5).eval(), TOKENIZER, together=12)
    sampling = Sampling(1.0, 1.0, 60)
    longest = max(len(ids_of(request, TOKENIZER, sampling)) for request in REQUESTS) + 60
    batching = engine._batching(longest)
    assert batching.leaving
    alone = responses(LocalEngine(engine.model, TOKENIZER, together=1), REQUESTS, sampling)
    whole = 12 * max(response.tokens for response in alone.values())
    for leaving in (True, False):
        engine._batching, widths = lambda _, leaving=leaving: replace(batching, leaving=leaving), list[int]()
        with engine.model.model.register_forward_hook(
            lambda *each, widths=widths: widths.append(len(each[2].last_hidden_state))
        ):
            assert responses(engine, REQUESTS, sampling) == alone
        assert sum(widths) < 0.8 * whole if leaving else sum(widths) == whole


def test_seed_and_number_each_make_another_response(engine: LocalEngine) -> None:
    same_prompt = [Request(number, PROBLEMS[0].prompt) for number in range(8)]
    found = responses(engine, same_prompt, SAMPLING)
    assert len({response.text for response in found.values()}) > 4
    other = responses(engine, same_prompt, Sampling(1.0, 0.95, 24, seed=1))
    assert sum(found[number] != other[number] for number in found) > 4


def test_tokens_are_drawn_from_the_tempered_nucleus() -> None:
    """40,000 rows of one distribution against its law, written out."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])
    probability = np.exp(logits / 0.7)
    probability /= probability.sum()
    nucleus = np.where(
        [True, True, True, False, False, False], probability, 0
    )  # 0.689, 0.165, 0.081: past 0.9 with three
    assert probability[:2].sum() < 0.9 < probability[:3].sum()
    rows = [Request(number, "") for number in range(40_000)]
    chooser = OwnRandomNumbers(rows, Sampling(temperature=0.7, top_p=0.9, max_new_tokens=1), prompt_length=4)
    scores = torch.tensor(logits, dtype=torch.float32).expand(len(rows), -1)
    chosen = chooser(torch.zeros(len(rows), 4, dtype=torch.long), scores)
    assert (chosen.isfinite().sum(-1) == 1).all()
    share = np.bincount(chosen.argmax(-1), minlength=6) / len(rows)
    assert share == pytest.approx(nucleus / nucleus.sum(), abs=0.009)


def test_greedy_is_the_most_likely_token(engine: LocalEngine) -> None:
    found = responses(engine, REQUESTS[:1], Sampling(temperature=0, max_new_tokens=6))[0]
    ids = ids_of(REQUESTS[0], TOKENIZER, SAMPLING)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    assert found.text == TOKENIZER.decode(ids[-found.tokens :], skip_special_tokens=True)


def test_what_the_limit_ends_is_cut_and_what_ends_itself_is_not(engine: LocalEngine) -> None:
    found = responses(engine, REQUESTS, Sampling(1.0, 1.0, 60))
    for response in found.values():
        written = len(TOKENIZER(response.text)["input_ids"])
        assert response.tokens == 60 if response.truncated else response.tokens < 60
        assert written <= response.tokens
    assert {response.truncated for response in found.values()} == {True, False}


def test_the_end_token_of_the_generation_config_ends_a_response_too() -> None:
    model = tiny_model(0, scale=1.5).eval()
    most = int(model(torch.tensor([ids_of(REQUESTS[0], TOKENIZER, SAMPLING)])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, most]
    found = responses(LocalEngine(model, TOKENIZER), REQUESTS[:1], Sampling(temperature=0, max_new_tokens=5))[0]
    assert (found.tokens, found.truncated) == (1, False)


def test_a_response_that_cannot_fit_is_refused_beforehand(engine: LocalEngine) -> None:
    limit = engine.model.config.max_position_embeddings
    engine.check(REQUESTS, SAMPLING)
    with pytest.raises(ContextError, match="lower --max-new-tokens to at most"):
        engine.check(REQUESTS, Sampling(max_new_tokens=limit))
    long = Request(0, "what is 1" + "+1" * limit + "?")
    with pytest.raises(ContextError, match="or drop the prompt"):
        engine.check([long], SAMPLING)


def test_messages_need_a_chat_template() -> None:
    talk = [{"role": "user", "content": "what is 1+1?"}]
    assert TOKENIZER.decode(ids_of(Request(0, talk), TOKENIZER, SAMPLING)) == "what is 1+1?"

    class Plain:
        chat_template = None

    with pytest.raises(TOPDError, match="no chat template"):
        ids_of(Request(0, talk), Plain(), SAMPLING)


@pytest.mark.parametrize(
    ("name", "how", "temperature"),
    [
        ("RwkvForCausalLM", "one prompt at a time", 1.0),
        ("RecurrentGemmaForCausalLM", "prompts of equal length together", 0.0),
        ("RecurrentGemmaForCausalLM", "prompts of equal length together", 1.0),
    ],
)
def test_a_model_that_does_not_ignore_padding_answers_as_it_does_alone(name: str, how: str, temperature: float) -> None:
    """RWKV of transformers also mixes the rows of a batch while it decodes."""
    model = tiny(name, vocab_size=len(TOKENIZER))
    sampling = Sampling(temperature, 1.0, 16)
    lengths = [len(ids_of(request, TOKENIZER, sampling)) for request in REQUESTS]
    assert 1 < len(set(lengths)) < len(lengths)
    with pytest.warns(UserWarning, match=f"{name} answers {how}") as notices:
        batches = list(LocalEngine(model, TOKENIZER, together=12).respond(REQUESTS, sampling))
    assert len([notice for notice in notices if "is slower" in str(notice.message)]) == 1
    assert len(batches) == len(lengths if "one" in how else set(lengths))
    alone = responses(LocalEngine(model, TOKENIZER, together=1), REQUESTS, sampling)
    assert dict(pair for batch in batches for pair in batch) == alone


def test_prompts_whose_rows_cross_a_rotary_limit_are_answered_by_length() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny(
        "Phi3ForCausalLM", vocab_size=len(TOKENIZER), max_position_embeddings=256, original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
    )  # fmt: skip
    sampling = Sampling(temperature=0, max_new_tokens=24)
    with pytest.warns(UserWarning, match="longest row beyond 16 tokens"):
        together = responses(LocalEngine(model, TOKENIZER, together=12), REQUESTS, sampling)
    assert together == responses(LocalEngine(model, TOKENIZER, together=1), REQUESTS, sampling)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("top_p", [1e-4, 0.5, 0.95, 0.9999, 1.0])
def test_a_nucleus_is_that_of_transformers(spread, top_p):
    """Narrow ones without sorting the vocabulary, wide ones by transformers' own code."""
    logits = spread * torch.randn(5, 2000, generator=torch.Generator().manual_seed(0))
    expected = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    assert torch.equal(nucleus(logits, top_p), expected)
