"""Mistakes of the field that nothing else here proves absent; docs/troubleshooting.md lists them all."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import TOKENIZER, tiny_trainer

from topd.training import TOPDTrainer


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_a_pad_token_that_is_the_end_token_changes_nothing(tmp_path, method):
    """The end of a response is trained on, though it looks like padding."""
    trained = []
    for pad in ("<pad>", "<eos>"):
        tokenizer = copy.deepcopy(TOKENIZER)
        tokenizer.pad_token = pad
        trainer = tiny_trainer(
            tmp_path / pad, tokenizer=tokenizer, method=method, max_completion_length=40, max_steps=1
        )
        batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(8)])
        ends = (batch["completion_ids"] == TOKENIZER.eos_token_id) & batch["completion_mask"].bool()
        assert ends.any()
        assert (ends.sum(-1) <= 1).all()
        trainer.train()
        trained.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


class Watched(TOPDTrainer):
    """Keeps the weights that each step's rollouts are sampled from."""

    def _generate_single_turn(self, *args, **kwargs):
        embedding, seen = self.model.get_input_embeddings(), []
        hook = embedding.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
        output = super()._generate_single_turn(*args, **kwargs)
        hook.remove()
        self.sampled_from = [*getattr(self, "sampled_from", []), seen[-1]]
        return output


def test_rollouts_come_from_the_weights_of_the_last_step(tmp_path):
    """Not from a copy that lags behind: what samples in step 2 is what step 1 left."""
    trainer = tiny_trainer(tmp_path, Watched, max_steps=3, save_strategy="steps", save_steps=1)
    first = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    left = [load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2)]
    expected = [first, *(weights["model.embed_tokens.weight"] for weights in left)]
    assert all(torch.equal(a, b) for a, b in zip(trainer.sampled_from, expected, strict=True))
    assert not torch.equal(*expected[:2])
