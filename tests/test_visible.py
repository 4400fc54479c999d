"""Text from elsewhere acts neither on a terminal nor on a page."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest

from topd import cli
from topd.check.findings import Finding, findings_table
from topd.errors import ServerError, TOPDError
from topd.report.reading import clean
from topd.teachers.openai_server import Limits, OpenAIServer, TemporaryFailure
from topd.visible import visible

HOSTILE = "\x1b[2Ja\x9b31mb\u202ec\u2066d\u200fe\x07\r\x7f"
SHOWN = "␛[2Ja\\u009b31mb\\u202ec\\u2066d\\u200fe␇␍␡"


def test_controls_and_changes_of_direction_are_shown_and_other_text_stays() -> None:
    assert visible(HOSTILE) == clean(HOSTILE) == SHOWN
    text = "naïve × 你好 🙂 שלום\tx\nü"
    assert visible(text) == text
    assert visible("a\ud800b") == "a?b"


def test_an_error_that_quotes_a_server_is_printed_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TOPDError(HOSTILE)

    monkeypatch.setattr("topd.cli.check.main", fails)
    assert cli.main(["check"]) == 2
    assert capsys.readouterr().err == f"topd: {SHOWN}\n"


def test_a_server_s_words_are_logged_so(caplog: pytest.LogCaptureFixture) -> None:
    server = OpenAIServer("http://localhost:1", limits=Limits(patience=0.1))

    async def fails() -> None:
        raise TemporaryFailure(HOSTILE)

    async def ask() -> None:
        await server._answer(fails, "/models", dict, anyio.Event())

    with caplog.at_level(logging.WARNING), pytest.raises(ServerError):
        anyio.run(ask)
    assert f"fails ({visible(' '.join(HOSTILE.split()))})" in caplog.text


def test_what_a_check_found_is_shown_so() -> None:
    table = findings_table([Finding("data", "warning", HOSTILE, HOSTILE)], HOSTILE)
    assert [str(cell).replace("\\[", "[") for column in table.columns[2:] for cell in column.cells] == [SHOWN, SHOWN]
