"""Rollouts end at their n-th informative position, and sampling stops once all of them have."""

import oracles
import pytest
import torch
from datasets import Dataset
from tiny import TOKENIZER, prompts, tiny_model, tiny_trainer

from topd.algorithm import Head, top_k_overlap
from topd.embedded.pair import pair_folder
from topd.errors import TOPDError
from topd.near_future.sampling import GROWTH, OVERLAP, TOP_K, InformativeEnd, local_pair
from topd.training import TOPDTrainer

PROMPTS = [TOKENIZER(row["prompt"])["input_ids"] for row in prompts(6)]


def informative(student, teacher, prompt, response):
    """Position by position, from the logits of each sequence alone."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = [model.eval()(ids).logits[0, len(prompt) - 1 : -1] for model in (student, teacher)]
    overlaps = oracles.top_k_overlap(*logits, TOP_K)
    return [overlap < OVERLAP for overlap in overlaps]


@pytest.mark.parametrize("tile", [None, 7])
def test_overlap_is_what_one_would_count(tile):
    random = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(2, 9, 5, generator=random), torch.randn(2, 11, 5, generator=random)
    found = top_k_overlap(hidden[0], Head(weights[0]), hidden[1], Head(weights[1]), 4, tile)
    expected = oracles.top_k_overlap(hidden[0] @ weights[0].T, hidden[1] @ weights[1].T, 4)
    assert found.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 2


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_each_response_is_cut_behind_its_last_wanted_position(most):
    student, teacher = tiny_model(0, scale=1.5), tiny_model(1, 96, scale=1.5)
    responses = [list(range(3, 9 + 2 * row)) for row in range(6)]
    end = InformativeEnd(*local_pair(student, teacher, TOKENIZER), PROMPTS, TOKENIZER, [1], most)
    for prompt, response, cut in zip(PROMPTS, responses, end.cut(responses), strict=True):
        marks = informative(student, teacher, prompt, response)
        wanted = next((n for n in range(1, len(marks) + 1) if sum(marks[:n]) == most), len(marks))
        assert cut == response[:wanted]


class Lengths(TOPDTrainer):
    """Remembers the rollouts, and how many tokens `generate` sampled."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        tokens, forward = [], self.model.forward

        def counted(*args, **kwargs):
            tokens.append(1)
            return forward(*args, **kwargs)

        self.model.forward = counted
        responses = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        del self.model.forward
        self.sampled, self.found = len(tokens), list(zip(prompt_ids, responses, strict=True))
        return responses


@pytest.mark.parametrize("conversational", [False, True])
def test_training_samples_no_further_than_a_check_and_cuts_exactly(tmp_path, conversational):
    student, teacher = tiny_model(0), tiny_model(1, 96)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(8)]
    trainer = tiny_trainer(
        tmp_path, Lengths, student=student, teacher=teacher, max_completion_length=60, max_informative_tokens=4,
        learning_rate=0.0, num_iterations=2, max_steps=2, dataset=Dataset.from_list(rows) if conversational else None,
    )  # fmt: skip
    trainer.train()
    counts = [sum(informative(student, teacher, *each)) for each in trainer.found]
    ends = [response[-1] in trainer.eos_token_ids for _, response in trainer.found]
    assert all(count == 4 or ended for count, ended in zip(counts, ends, strict=True))
    assert any(count == 4 for count in counts)
    longest = max(len(response) for _, response in trainer.found)
    assert longest <= trainer.sampled <= GROWTH * longest + 4 < 60
    assert trainer.state.log_history[0]["completions/max_length"] == longest
    assert "generate" not in vars(trainer.model)


def test_the_embedded_pair_s_rollouts_get_shorter_in_training_only(tmp_path):
    pair = {"student": str(pair_folder("student-standard")), "teacher": str(pair_folder("teacher"))}
    lengths = []
    for out, most in (("a", None), ("b", 4)):
        trainer = tiny_trainer(
            tmp_path / out, max_completion_length=64, max_informative_tokens=most, max_steps=1, **pair,
            trainer_options={"eval_dataset": prompts(4)}, generation_kwargs={"do_sample": False}, learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()
        entry = {name: value for each in trainer.state.log_history for name, value in each.items()}
        lengths.append((entry["completions/mean_length"], entry["eval_completions/mean_length"]))
    assert lengths[1][0] < lengths[0][0]
    assert lengths[1][1] == lengths[0][1]


def test_rollouts_may_grow_with_the_steps(tmp_path):
    options = {"max_completion_length": 20, "max_completion_length_start": 4, "max_completion_length_steps": 4}
    trainer = tiny_trainer(tmp_path, max_steps=6, num_iterations=1, **options)
    trainer.train()
    longest = [entry["completions/max_length"] for entry in trainer.state.log_history if "loss" in entry]
    assert longest == [4, 8, 12, 16, 20, 20]
    assert trainer.generation_config.max_new_tokens == 20


def test_where_the_end_of_rollouts_cannot_be_checked_is_said(tmp_path):
    trainer = tiny_trainer(tmp_path, method="opd", max_informative_tokens=4)
    trainer.tools = [print]
    with pytest.raises(TOPDError, match="text without tools"):
        trainer._check_rollouts()
    trainer.tools, trainer.is_fsdp_enabled = None, True
    with pytest.raises(TOPDError, match="under DDP"):
        trainer._check_rollouts()
