"""A label names a folder under --out, never one above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from topd.errors import TOPDError
from topd.evaluation.run import label_and_source, labelled_models


@pytest.mark.parametrize(
    ("name", "label"),
    [("a=x/y", "a"), ("x/y", "y"), ("x:y", "x-y"), ("..=x/y", "y"), ("x/../..=z", "..=z"), (".a=x", ".a=x")],
)
def test_the_label_is_a_name(name: str, label: str) -> None:
    assert label_and_source(name)[0] == label


@pytest.mark.parametrize("name", ["..", "../..", "x/..", "."])
def test_a_folder_that_is_called_by_dots_gets_its_own_name(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "one" / "two" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one" / "two")
    assert label_and_source(name)[0] in {"one", "two", tmp_path.name}
    assert label_and_source(name)[1] == name


def test_what_has_no_name_must_be_given_one() -> None:
    with pytest.raises(TOPDError, match="give it a name"):
        labelled_models(["/"])
