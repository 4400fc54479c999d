"""The pictures of the README are drawn from records."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from made_records import HOSTILE, candidate, record, write_arm


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`docs/pictures.py`, without the screenshot."""
    spec = importlib.util.spec_from_file_location("pictures", Path(__file__).parents[2] / "docs" / "pictures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "photograph", lambda run, compare, out: False)
    return module


def elements(file: Path, tag: str) -> list[ElementTree.Element]:
    return ElementTree.parse(file).getroot().findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_a_fork_with_both_windows_and_the_plan(pictures: ModuleType, tmp_path: Path, capsys: Any) -> None:
    run = write_arm(tmp_path / "topd", [record(s, candidates=[candidate(distance=0.1 * s)]) for s in (1, 2, 3, 4)])
    assert pictures.main([str(run), "--out", str(tmp_path)]) == 0
    assert "Fork 2 of 4: Step 3, D_OT 0.300" in capsys.readouterr().out
    for name in ("light", "dark"):
        file = tmp_path / f"fork-{name}.svg"
        assert len(elements(file, "rect")) == 7  # 3 tokens of the student, 4 of the teacher
        assert len(elements(file, "path")) == 6  # 2 branches, 4 links of the plan
        texts = [element.text for element in elements(file, "text")]
        assert "fork, transport distance 0.300" in texts
        assert "3 of 3 tokens are matched to the same token (dotted)" in texts
        assert [text for text in texts if text in ("5", "+", "2", "×")] == ["5", "+", "2", "2", "×", "5", "+"]
    light, dark = ((tmp_path / f"fork-{name}.svg").read_text() for name in ("light", "dark"))
    assert light != dark
    assert pictures.main([str(run), "--out", str(tmp_path), "--fork", "1"]) == 0
    assert "Step 4, D_OT 0.400" in capsys.readouterr().out


def test_text_of_a_model_stays_text(pictures: ModuleType, tmp_path: Path) -> None:
    plan = [[i, i, 0.07] for i in range(len(HOSTILE))]
    hostile = candidate(0, token=HOSTILE[0], student_window=HOSTILE, teacher_window=HOSTILE[::-1], plan=plan)
    run = write_arm(tmp_path / "topd", [record(prompt="".join(HOSTILE), candidates=[hostile])])
    assert pictures.main([str(run), "--out", str(tmp_path)]) == 0
    file = tmp_path / "fork-light.svg"
    assert HOSTILE[0] in [element.text for element in elements(file, "text")]
    assert not elements(file, "script")
    assert not elements(file, "img")


def test_without_a_fork_there_is_no_picture(pictures: ModuleType, tmp_path: Path, capsys: Any) -> None:
    run = write_arm(tmp_path / "topd", [record(candidates=[candidate(fork=False)])])
    assert pictures.main([str(run), "--out", str(tmp_path)]) == 2
    assert "no audited fork" in capsys.readouterr().err
    write_arm(tmp_path / "topd", [record()])
    assert pictures.main([str(run), "--fork", "2", "--out", str(tmp_path)]) == 2
    assert "numbered 1 to 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))
