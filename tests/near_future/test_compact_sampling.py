"""Rows that have ended leave the batch: the same responses, and the states of a scoring pass."""

import warnings
from unittest.mock import patch

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from special_models import special_model
from test_shared_prefix import EOS, model_of
from tiny import tiny_trainer
from transformers import GenerationConfig

from topd.near_future import DistilledModel, LocalModel, Rollouts, ways_of
from topd.near_future.sampling import SamplingStates, after_the_others_left, compact_sampling
from topd.near_future.self_check import batching_of

START, LONGEST = 5, 24


def prompts(rows=8):
    mask = torch.ones(rows, START, dtype=torch.long)
    mask[::2, :2] = 0
    return {"input_ids": torch.randint(3, 47, (rows, START)) * mask, "attention_mask": mask}


def config(ends, **options):
    return GenerationConfig(max_new_tokens=LONGEST, eos_token_id=ends, pad_token_id=0, **options)


def masked(sequences, ends):
    """Response ids and mask up to the first end token."""
    response = sequences[:, START:]
    end = torch.isin(response, torch.tensor(ends))
    mask = (end.cumsum(1) - end.long() == 0).long()
    return response * mask, mask


@pytest.mark.parametrize("model", [model_of("qwen3"), model_of("llama"), special_model("gemma3")])
def test_greedy_responses_are_those_of_one_batch(model):
    inputs, widths = prompts(), []
    endless = model.generate(**inputs, generation_config=config(None, do_sample=False))
    ends = [int(endless[row, START + 2 + 3 * row]) for row in range(6)]  # these rows end one after the other
    plain = masked(model.generate(**inputs, generation_config=config(ends, do_sample=False)), ends)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with handle, compact_sampling(model):
        compact = masked(model.generate(**inputs, generation_config=config(ends, do_sample=False)), ends)
    assert torch.equal(compact[1], plain[1])
    assert torch.equal(compact[0], plain[0])
    lengths = plain[1].sum(1)
    assert len(set(lengths.tolist())) > 1
    assert sum(widths) < 8 * int(lengths.max())


def test_the_least_length_is_counted_from_the_prompt():
    torch.manual_seed(0)
    model, ends = model_of("qwen3"), list(range(20, 45))
    options = {"do_sample": True, "temperature": 5.0, "top_k": 0, "min_new_tokens": 5}
    with compact_sampling(model):
        sequences = model.generate(**prompts(64), generation_config=config(ends, **options))
    lengths = masked(sequences, ends)[1].sum(1)
    assert lengths.min() == 6
    assert {6, 7, 8} <= set(lengths.tolist())


def test_every_token_is_sampled_behind_its_own_row_and_the_states_are_kept():
    model, states, inputs, ends = model_of("qwen3"), SamplingStates(), prompts(), list(range(20, 26))
    with states.keeping(model), compact_sampling(model, states):
        sequences = model.generate(**inputs, generation_config=config(ends, do_sample=True, temperature=5.0, top_k=0))
    response, mask = masked(sequences, ends)
    assert len(set(mask.sum(1).tolist())) > 2
    rollouts = Rollouts(inputs["input_ids"], inputs["attention_mask"], response, mask, mask)
    scored = DistilledModel(model, LocalModel(model, 0, [EOS])).prefill(rollouts)
    kept = states.prefill(rollouts, keep_prefix=False)
    assert torch.allclose(kept.hidden[mask.bool()], scored.hidden[mask.bool()], atol=1e-4)
    assert states.prefill(rollouts, keep_prefix=True) is None  # the cache has lost rows


@pytest.mark.parametrize(
    ("method", "kind", "calls"),
    [("opd", "qwen3", 1), ("topd", "qwen3", 1), ("topd", "gemma3", 1), ("opd", "qwen3.5", 0), ("topd", "qwen3.5", 0)],
)
def test_training_takes_it_or_says_that_it_does_not(tmp_path, monkeypatch, caplog, method, kind, calls):
    """Also with a cache that windows cannot be decoded over (gemma3's drops tokens); not with recurrent states."""
    MultiProcessAdapter.warning_once.cache_clear()
    students = {} if kind == "qwen3" else {"student": special_model(kind)}
    trainer = tiny_trainer(tmp_path, method=method, compact_sampling=True, max_steps=1, **students)
    called = []

    def counted(*given):
        called.append(given)
        return compact_sampling(*given)

    monkeypatch.setattr("topd.training.models.compact_sampling", counted)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 1
    assert losses[0] > 0
    assert len(called) == calls
    assert ("compact_sampling has no effect here" in caplog.text) == (calls == 0)


def test_a_static_cache_which_rows_cannot_leave_is_kept_whole(tmp_path, caplog):
    MultiProcessAdapter.warning_once.cache_clear()
    trainer = tiny_trainer(tmp_path, compact_sampling=True, cache_implementation="static", max_steps=1)
    trainer.train()
    assert [entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True]
    assert "compact_sampling has no effect here: cache_implementation is static" in caplog.text


@pytest.mark.parametrize(("kind", "leaving"), [("gemma3", True), ("qwen3.5", False)])
def test_whether_rows_may_leave_is_tried(kind, leaving):
    model = special_model(kind)
    assert batching_of(model, 60).leaving == ways_of(model).leaving == leaving


def test_rows_are_continued_without_deprecated_names():
    model = model_of("llama")
    inputs = prompts()
    with warnings.catch_warnings(), patch("transformers.utils.generic.logger.warning_once") as logged:
        warnings.simplefilter("error", FutureWarning)
        after_the_others_left(model, **inputs, pad=0)
    assert not logged.called
