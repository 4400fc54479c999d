"""Every causal language model class of the installed transformers is exact, or refused: see docs/architectures.md."""

import json
from pathlib import Path

import pytest
from sweep import row_of
from tiny_architectures import classes

RECORD = Path(__file__).parents[2] / "docs" / "architectures.json"
ROWS = {row["class"]: row for row in json.loads(RECORD.read_text(encoding="utf-8"))}


def test_no_class_is_wrong():
    assert {row["way"] for row in ROWS.values()} <= {"shared", "partly shared", "plain", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("name", classes())
def test_a_class_is_exact_and_does_what_the_record_says(name):
    row, recorded = row_of(name), ROWS.get(name)
    if recorded is not None:
        assert row["way"] == recorded["way"]
        assert row["way"] == "refused" or row["why"] == recorded["why"]  # reasons hold measured differences
