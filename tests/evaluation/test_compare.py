"""Comparisons from records that a test writes: Table 1's layout, the mean, Holm, notes, refusals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_evaluations import write_evaluation
from rich.console import Console

from topd.cli.main import main
from topd.errors import TOPDError
from topd.evaluation.accuracy import accuracy_difference, accuracy_interval, holm
from topd.evaluation.compare import compare, evaluation_folders
from topd.evaluation.results import read_results, summary, write_result
from topd.evaluation.tables import comparison_tables, result_table


def shown(what: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()


@pytest.fixture
def three(tmp_path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Three models on two competitions of 30, five samples; written to folders, too."""
    rng = np.random.default_rng(0)
    tables: dict[str, dict[str, np.ndarray]] = {}
    for label, chance in (("warm", 0.4), ("opd", 0.5), ("topd", 0.9)):
        tables[label] = {name: rng.random((30, 5)) < chance for name in ("hmmt25", "aime24")}
        for name, right in tables[label].items():
            write_evaluation(tmp_path / label, name, right)
    return tables


def test_rows_columns_and_mean_are_the_papers_layout(three: dict[str, Any], tmp_path: Path) -> None:
    told = compare([tmp_path / "warm", tmp_path / "opd", tmp_path / "topd"], tmp_path / "out")
    assert told == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert told["columns"] == ["aime24", "hmmt25"]
    assert list(told["models"]) == ["warm", "opd", "topd"]
    for label, tables in three.items():
        row = told["models"][label]
        assert row["mean"]["mean"] == pytest.approx((tables["aime24"].mean() + tables["hmmt25"].mean()) / 2)
        found = accuracy_interval([tables["aime24"]])
        assert (row["aime24"]["low"], row["aime24"]["high"]) == (found.low, found.high)
    text = shown(comparison_tables(told))
    assert all(word in text for word in ("aime24", "hmmt25", "mean", "The paper's Table 1", "63.3", "52.2"))
    assert "53.3" not in text  # aime25 was not asked, so the paper's is not shown
    assert max(map(len, text.splitlines())) <= 80


def test_each_model_is_compared_with_the_first_on_each_benchmark_and_the_mean(
    three: dict[str, Any], tmp_path: Path
) -> None:
    rows = compare([tmp_path / "warm", tmp_path / "opd", tmp_path / "topd"], tmp_path)["comparisons"]
    assert [(row["model"], row["column"]) for row in rows] == [
        (model, column) for model in ("opd", "topd") for column in ("aime24", "hmmt25", "mean")
    ]
    both = [[three[label][name] for name in ("aime24", "hmmt25")] for label in ("topd", "warm")]
    expected = accuracy_difference(*both)
    assert (rows[-1]["mean"], rows[-1]["p"], rows[-1]["n"]) == (expected.mean, expected.p, 60)
    assert [row["p_holm"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]))
    assert rows[-1]["p_holm"] < 0.01 < rows[0]["p_holm"]


def test_only_what_both_have_is_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "aime24", np.ones((6, 2)))
    write_evaluation(tmp_path / "b", "aime24", np.zeros((6, 3)))
    write_evaluation(tmp_path / "b", "mine", np.zeros((4, 1)))
    told = compare([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert [row["column"] for row in told["comparisons"]] == ["aime24"]
    assert "mean" not in told["models"]["a"]
    assert "mean" in told["models"]["b"]


def test_other_problems_under_the_same_name_are_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "mine", np.ones((6, 2)))
    write_evaluation(tmp_path / "b", "mine", np.ones((7, 2)))
    with pytest.raises(TOPDError, match=r"different problems or prompts under the name mine.*same --limit"):
        compare([tmp_path / "a", tmp_path / "b"], tmp_path)


def test_other_settings_are_noted(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "mine", np.ones((6, 2)), temperature=0.6, versions={"torch": "2.13"})
    write_evaluation(tmp_path / "b", "mine", np.ones((6, 2)), temperature=1.0, versions={"torch": "2.14"})
    told = compare([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert told["notes"] == ["mine: temperature is 0.6 for a and 1.0 for b", "mine: torch is 2.13 for a and 2.14 for b"]
    assert "Note: mine: temperature is 0.6 for a" in shown(comparison_tables(told), 200)


def test_folders_are_found_in_a_folder_and_labelled_apart(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / run / "student", "mine", np.ones((6, 2))) for run in ("one", "two")]
    assert evaluation_folders([tmp_path / "one", tmp_path / "two" / "student"]) == folders
    told = compare(folders, tmp_path)
    assert list(told["models"]) == ["one/student", "two/student"]
    with pytest.raises(TOPDError, match="contains no evaluation"):
        evaluation_folders([tmp_path / "nothing"])


def test_an_unfinished_evaluation_counts_what_all_problems_have(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a", "mine", [[1, 0], [1, 1], [0, 1]])
    file = folder / "mine.samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # the last sample is torn
    found = read_results(folder)["mine"]
    assert found.right.tolist() == [[1], [1], [0]]
    file.write_text("".join(lines[:3]))
    with pytest.raises(TOPDError, match="Run the same `topd eval` again"):
        read_results(folder)


def test_the_result_table_fits_a_terminal(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "embedded", np.random.default_rng(0).random((1000, 16)) < 0.5)
    text = shown(result_table(write_result(tmp_path / "a")))
    assert "1000 x 16" in text
    assert "…" not in text


def test_names_in_tables_are_printed_as_they_are(tmp_path: Path) -> None:
    for label in ("a [lr]", "b [x]"):
        write_evaluation(tmp_path / label, "mine [k]", np.eye(3))
    text = shown(result_table(write_result(tmp_path / "a [lr]")))
    text += shown(comparison_tables(compare([tmp_path / "a [lr]", tmp_path / "b [x]"], tmp_path)))
    assert [text.count(name) for name in ("a [lr]", "b [x]", "mine [k]")] == [3, 2, 3]


def test_majority_and_counts_by_hand(tmp_path: Path) -> None:
    """Two problems: 7 7 8 is right by majority, 8 8 7 is not."""
    write_evaluation(tmp_path / "a", "mine", [[1, 1, 0], [0, 0, 1]])
    told = summary(read_results(tmp_path / "a")["mine"])
    assert [problem["majority"] for problem in told["by_problem"]] == [1.0, 0.0]
    assert told["pass_at"]["1"]["mean"] == pytest.approx(0.5)
    assert told["pass_at"]["2"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert (told["wrong"], told["unparsed"], told["tokens_mean"]) == (3, 0, 10.0)


def test_the_command_compares_folders(
    three: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "two words"
    place.mkdir()
    folders = [str((tmp_path / label).rename(place / label)) for label in three]
    assert main(["eval", "--compare", *folders, "--out", str(tmp_path / "out"), "--gain", "10"]) == 0
    out = capsys.readouterr().out
    assert "problems needed: for a gain of 10.0 points" in " ".join(out.split())
    _, _, command = out.strip().rpartition("As a page: ")
    assert shlex.split(command) == ["topd", "report", folders[0], "--compare", *folders[1:]]
