"""Training architectures that TRL or the shared ways would get wrong. The whole list: tests/architectures."""

import pytest
from sweep import PROMPTS, examine_training
from tiny import tiny_trainer
from tiny_architectures import tiny

from topd.errors import TOPDError


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("GPT2LMHeadModel", "opd"),  # absolute positions: TRL's loss is wrong with left padding
        ("Phi3ForCausalLM, LongRoPE, rows beyond the switch", "opd"),  # TRL rotates all rows by the longest
        ("InklingForCausalLM", "opd"),  # TRL does not read the scale of its logits
        ("Llama4ForCausalLM", "opd"),  # TRL does not find its backbone
        ("Qwen3_5ForCausalLM", "topd"),  # linear attention
        ("RwkvForCausalLM", "topd"),  # ignores left padding
    ],
)
def test_two_steps_with_left_padding(name, method):
    examine_training(tiny(name, 0), tiny(name, 1), method, PROMPTS)


def test_where_trl_is_wrong_a_beta_that_only_trl_has_is_refused(tmp_path):
    trainer = tiny_trainer(
        tmp_path, student=tiny("GPT2LMHeadModel", 0), teacher=tiny("GPT2LMHeadModel", 1), method="opd", beta=0.5
    )
    with pytest.raises(TOPDError, match="beta 0 or 1"):
        trainer.train()
