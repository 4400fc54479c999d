"""Settings in a model's generation config reach no engine, no window and no rollout; all of its end tokens do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, tiny_model, tiny_trainer

from topd.embedded.task import make_problems
from topd.evaluation.embedded import answer_problems
from topd.evaluation.engines import LocalEngine, Request, Sampling
from topd.near_future import DistilledModel, LocalModel, Places
from topd.near_future.model_parts import end_token_ids, own_settings_only, padding_id
from topd.near_future.sampling import sample_rollouts

LEAKING = {
    "do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.4, "min_p": 0.3, "typical_p": 0.5,
    "repetition_penalty": 4.0, "no_repeat_ngram_size": 1, "suppress_tokens": [5, 6, 7, 8, 9], "num_beams": 3,
    "begin_suppress_tokens": [10, 11], "bad_words_ids": [[12]], "min_new_tokens": 12, "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": [2, 1.5], "length_penalty": 2.0,
}  # fmt: skip
"""Every one of these changes what `generate` gives unless it is set; vLLM and SGLang take the first seven."""
PROBLEMS = make_problems(6, 3, held_out=True)
IDS = [torch.tensor(TOKENIZER(problem.prompt)["input_ids"]) for problem in PROBLEMS]


def pair() -> tuple[Any, Any]:
    """The same weights twice; the second model's generation config has all of `LEAKING`."""
    plain, leaking = tiny_model(0, scale=1.5).eval(), tiny_model(0, scale=1.5).eval()
    for name, value in LEAKING.items():
        setattr(leaking.generation_config, name, value)
    return plain, leaking


def test_the_settings_do_change_what_generate_gives() -> None:
    first, second = (model.generate(IDS[0][None], max_new_tokens=16) for model in pair())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sampling", [Sampling(0, 1.0, 16), Sampling(1.0, 0.95, 16)], ids=["greedy", "sampled"])
def test_the_local_engine_samples_by_its_own_settings(sampling: Sampling) -> None:
    requests = [Request(number, problem.prompt) for number, problem in enumerate(PROBLEMS)]
    first, second = ([*LocalEngine(model, TOKENIZER).respond(requests, sampling)] for model in pair())
    assert first == second


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_windows_from_fresh_prefixes_and_rollouts_do_too(temperature: float) -> None:
    found = []
    for model in pair():
        torch.manual_seed(0)
        windows = LocalModel(model, 0, [TOKENIZER.eos_token_id], temperature).continue_(IDS, 12)
        rollouts = sample_rollouts(model, TOKENIZER, IDS, max_new_tokens=12, temperature=temperature or 0.5)
        found.append([windows.tokens, windows.mask, rollouts.response_ids, rollouts.response_mask])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_both_window_paths_give_the_same_windows() -> None:
    _, model = pair()
    torch.manual_seed(0)
    rollouts = sample_rollouts(model, TOKENIZER, IDS, max_new_tokens=12)
    rows, positions = rollouts.response_mask.nonzero(as_tuple=True)
    source = LocalModel(model, 0, [TOKENIZER.eos_token_id])
    distilled = DistilledModel(model, source)
    reading = distilled.prefill(rollouts)
    greedy = model.get_output_embeddings()(reading.hidden).argmax(-1)
    shared = distilled.continue_(Places(rollouts, rows, positions), 6, replace(reading, greedy=greedy))
    fresh = source.continue_(Places(rollouts, rows, positions).prefixes(), 6)
    assert torch.equal(shared.mask, fresh.mask)
    assert torch.equal(shared.tokens * shared.mask, fresh.tokens * fresh.mask)


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_rollouts_in_training_are_samples_of_the_student(tmp_path, method: str) -> None:
    """The same rollouts, the same losses; and the config stays the student's own."""
    losses = []
    for name, student in zip(("plain", "leaking"), pair(), strict=True):
        trainer = tiny_trainer(tmp_path / name, student=student, method=method, max_steps=1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert student.generation_config.num_beams == LEAKING["num_beams"]


def test_answers_to_the_embedded_task_do_too() -> None:
    first, second = (answer_problems(model, TOKENIZER, PROBLEMS) for model in pair())
    assert first == second


def test_a_peft_model_is_neutral_too_and_gets_its_config_back() -> None:
    peft = pytest.importorskip("peft")
    _, model = pair()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with own_settings_only(adapted):
        adapted.generate(input_ids=IDS[0][None], max_new_tokens=2, eos_token_id=1, pad_token_id=0)
        assert adapted.generation_config.num_beams is model.generation_config.num_beams is None
    assert adapted.generation_config.num_beams == model.generation_config.num_beams == LEAKING["num_beams"]


def test_after_an_error_the_config_is_back() -> None:
    _, model = pair()
    with pytest.raises(RuntimeError), own_settings_only(model):
        raise RuntimeError
    assert model.generation_config.num_beams == LEAKING["num_beams"]


@pytest.mark.parametrize(
    ("declared", "ends"), [(None, [1]), (1, [1]), (7, [1, 7]), ([7, 1], [1, 7]), ([9, 8], [1, 9, 8])]
)
def test_every_declared_end_token_ends_a_response(declared: Any, ends: list[int]) -> None:
    assert end_token_ids(SimpleNamespace(eos_token_id=declared), TOKENIZER) == ends


def test_rollouts_outside_training_end_at_a_second_end_token() -> None:
    """The token that the student says most often becomes an end token: nothing comes after it."""
    model = tiny_model(0, scale=1.5).eval()
    torch.manual_seed(0)
    before = sample_rollouts(model, TOKENIZER, IDS, max_new_tokens=20)
    second = int(before.response_ids[before.response_mask.bool()].mode().values)
    assert second != TOKENIZER.eos_token_id
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, second]
    torch.manual_seed(0)
    after = sample_rollouts(model, TOKENIZER, IDS, max_new_tokens=20)
    assert after.response_mask.sum() < before.response_mask.sum()
    for ids, mask in zip(after.response_ids, after.response_mask.bool(), strict=True):
        assert second not in ids[mask][:-1].tolist()


def test_a_tokenizer_without_padding_pads_with_its_end() -> None:
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=4)) == 4
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0
    assert padding_id(TOKENIZER) == TOKENIZER.pad_token_id
