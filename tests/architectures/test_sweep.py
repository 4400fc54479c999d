"""Every causal language model class of the installed transformers is exact, or refused: see docs/architectures.md."""

import json
from pathlib import Path

import pytest
import torch
from sweep import row_of
from tiny_architectures import VARIANTS, subjects, tiny

RECORD = Path(__file__).parents[2] / "docs" / "architectures.json"
ROWS = {row["class"]: row for row in json.loads(RECORD.read_text(encoding="utf-8"))}


def test_no_class_is_wrong():
    assert {row["way"] for row in ROWS.values()} <= {"shared", "partly shared", "plain", "refused", "not built"}


def test_every_class_and_variant_is_recorded():
    assert set(ROWS) == set(subjects())


@pytest.mark.slow
@pytest.mark.parametrize("subject", subjects())
def test_a_subject_is_exact_and_does_what_the_record_says(subject):
    row, recorded = row_of(subject), ROWS[subject]
    assert row["way"] == recorded["way"]
    assert row["way"] not in ("shared", "partly shared", "plain") or row["why"] == recorded["why"]


OF_LONG_ROWS = ("LlamaForCausalLM, dynamic NTK, all rows short", "MoshiForCausalLM, rows within the window")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in OF_LONG_ROWS])
def test_a_variant_is_another_model_than_its_class(variant):
    ids = torch.randint(3, 47, (1, 40), generator=torch.Generator().manual_seed(0))
    usual, other = tiny(variant.split(",")[0]), tiny(variant)
    if variant.endswith(", eager"):
        assert usual.config._attn_implementation != other.config._attn_implementation
    else:
        assert not torch.allclose(usual(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-3)
