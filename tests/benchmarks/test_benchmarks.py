"""The benchmark command: rows, files, failures. Its numbers are measured elsewhere; here sizes are tiny."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import CASES, opd, windows
from benchmarks.measure import ParityError, Timing, interleave, peak_memory, require
from benchmarks.row import Row, time_row
from topd import TOPDConfig

ABOUT = {"hardware", "versions", "threads", "load_average", "command", "commit"}
TIMING = Timing({"ours": [1.0, 2.0, 3.0], "peer": [2.0, 2.0, 2.0]})


def run(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = command.main(["--out", str(out), "--tiny", *arguments])
    return code, json.loads(out.read_text())


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Cases by name, each a function of the size, instead of the real ones."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(command, "CASES", found)
    monkeypatch.setattr(command.importlib, "import_module", lambda rows: SimpleNamespace(rows=rows))
    return found


def fast(size: str) -> Iterator[Row]:
    yield Row("fast", "a peer", ratio=0.5, gate=1.0)


def broken(size: str) -> Iterator[Row]:
    yield Row("broken", "a peer", ratio=2.0)
    raise ValueError("the sides\ndisagree")


def test_a_real_case_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, rows = run(tmp_path / "some" / "where.json", "--case", "transport")
    assert {row["case"] for row in rows} == {"transport"}
    assert "POT loop" in capsys.readouterr().out
    for row in rows:
        assert set(row) == {field.name for field in fields(Row)} | ABOUT
        assert row["error"] is None
    row = next(row for row in rows if row["beside"] == "POT loop")
    assert row["gate"] == 0.25
    assert row["ok"] == (row["ratio"] <= 0.25)
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    assert set(row["seconds"]) == {"ours", "beside"}
    assert "e-" in row["parity"]
    assert row["threads"]["torch"] == torch.get_num_threads()
    assert row["versions"]["torch"] == torch.__version__
    assert "--case transport" in row["command"]


@pytest.mark.parametrize(
    "case", ["gradient", *(pytest.param(case, marks=pytest.mark.slow) for case in ("loss", "opd"))]
)
def test_the_other_cases_measure(case: str, tmp_path: Path) -> None:
    _, rows = run(tmp_path / "rows.json", "--case", case)
    assert rows
    assert all(row["error"] is None and row["ratio"] > 0 for row in rows if "not installed" not in (row["note"] or ""))


def test_the_variants_of_plain_opd_are_trl_s_own_loss_and_ours() -> None:
    uses_ours = {
        name: TOPDConfig("unused", use_cpu=True, bf16=False, **of).opd_in_one_pass for name, of in opd.OURS.items()
    }
    assert uses_ours == {"trl": False, "one pass": True}


@pytest.mark.parametrize("peers", [True, False])
def test_windows_are_compared_with_all_sides_also_where_few_are_timed(
    peers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(windows, "require", lambda what, *_: compared.append(what))
    next(iter(windows._compare(windows.Plan(2, 32, 3, 4, 1, peers))))
    assert compared == [
        f"tokens of {side}" for side in ("ours", "generate, one batch", "generate, one by one", "copied caches")
    ]


def test_a_failing_case_is_a_row_and_the_others_go_on(tmp_path: Path, cases: dict[str, Any]) -> None:
    cases |= {"broken": broken, "fast": fast}
    code, rows = run(tmp_path / "rows.json")
    assert code == 0
    assert [(row["case"], row["ok"]) for row in rows] == [("broken", None), ("broken", False), ("fast", True)]
    assert rows[1]["error"] == "ValueError: the sides disagree"


def test_strict_exits_with_1_where_a_gate_fails(tmp_path: Path, cases: dict[str, Any]) -> None:
    cases["fast"] = fast
    assert run(tmp_path / "rows.json", "--strict")[0] == 0
    cases["slow"] = lambda size: [Row("slow", "a peer", ratio=1.5, gate=1.0)]
    assert run(tmp_path / "rows.json")[0] == 0
    assert run(tmp_path / "rows.json", "--strict")[0] == 1
    assert run(tmp_path / "rows.json", "--strict", "--case", "fast")[0] == 0


def test_the_file_is_whole_after_every_row(tmp_path: Path, cases: dict[str, Any]) -> None:
    out, seen = tmp_path / "rows.json", []

    def watching(size: str) -> Iterator[Row]:
        for _ in range(3):
            seen.append(len(json.loads(out.read_text())))
            yield Row("watching", "a peer")

    cases |= {"fast": fast, "watching": watching}
    run(out)
    assert seen == [1, 2, 3]


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, cases: dict[str, Any]) -> None:
    def interrupted(size: str) -> Iterator[Row]:
        raise KeyboardInterrupt
        yield

    cases |= {"fast": fast, "interrupted": interrupted}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 1


def test_an_unknown_case_names_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "rows.json", "--case", "transprot")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "'transprot'" in message
    assert all(name in message for name in CASES)


def test_markdown_of_a_missing_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--markdown", str(tmp_path / "none.json")])
    assert "no file" in capsys.readouterr().err


def test_the_list_has_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CASES)
    assert all(len(line.split()) > 3 for line in lines)


def test_a_missing_peer_is_an_informative_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geomloss", None)  # importing it raises
    _, rows = run(tmp_path / "rows.json", "--case", "transport")
    missing = next(row for row in rows if row["beside"] == "geomloss")
    assert "not installed: pip install" in missing["note"]
    assert missing["ok"] is missing["ratio"] is missing["error"] is None
    assert any(row["beside"] == "POT loop" and row["ratio"] for row in rows)


def test_sides_take_turns_and_ratios_are_of_each_repeat() -> None:
    calls: list[str] = []

    def side(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds

    sides = {"ours": lambda: side("ours", 1.0), "peer": lambda: side("peer", 4.0)}
    timing = interleave(sides, repeats=2, warmup=1, clock=lambda call: call())
    assert calls == ["ours", "peer", "ours", "peer", "peer", "ours"]  # warm-up, then each begins once
    assert timing.ratio("ours", "peer") == 0.25
    assert TIMING.ratios("ours", "peer") == [0.5, 1.0, 1.5]
    assert (TIMING.ratio("ours", "peer"), TIMING.spread("ours", "peer")) == (1.0, (0.75, 1.25))
    row = time_row("c", "peer", TIMING, gate=0.9)
    assert (row.ok, row.repeats, row.seconds) == (False, 3, {"ours": 2.0, "beside": 2.0})


@pytest.mark.parametrize("difference", [2e-6, float("nan")])
def test_parity_stops_a_case(difference: float) -> None:
    assert "5.0e-07" in require("distance", 5e-7, 1e-6)
    with pytest.raises(ParityError, match="distance differs by"):
        require("distance", difference, 1e-6)


def allocate(megabytes: int, before: int) -> Any:
    """For `peak_memory`: `before` MB are there already, `megabytes` come and go in the call."""
    kept = torch.ones(before, 250_000)
    return lambda: torch.ones(megabytes, 250_000).sum() + kept[0, 0]


def test_peak_memory_is_what_the_call_adds() -> None:
    assert 60e6 <= peak_memory("test_benchmarks:allocate", 64, 32) <= 75e6


def test_peak_memory_says_what_failed() -> None:
    with pytest.raises(RuntimeError, match=r"allocate with \('many', 1\) failed .*TypeError"):
        peak_memory("test_benchmarks:allocate", "many", 1)
